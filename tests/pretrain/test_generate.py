"""Generation: the cache against recomputation and the packed model, batches against single prompts, sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.prompt import probe_media, prompt_batch
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.kernels.tiles import attention_tables
from triweave.pretrain.batch import to_device
from triweave.pretrain.bench.generate import bench_generate
from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.config import RunConfig
from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation import caption_nll
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.generation import continuation as continuations
from triweave.pretrain.generation.continuation import Continuation
from triweave.pretrain.generation.generate import Sampling, draw, generate
from triweave.pretrain.model import kv_cache
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

CORPUS = Path(__file__).parents[1] / "data_pipeline" / "conftest.py"
GEOMETRY = MediaGeometry(image_patch_px=8, image_max_tokens=12)
FUSIONS = {
    "immediate": {"fusion": FusionConfig(kind="cross")},
    "preceding": {"fusion": FusionConfig(kind="cross", cross_every=1, scope="preceding")},
    "resampled": {"fusion": FusionConfig(kind="cross", resampler_latents=3)},
    "mmca": {"fusion": FusionConfig(kind="mmca")},
}
TAIL = "a small bird sits on a branch and sings"


@pytest.fixture(scope="module")
def corpus(rank_pool):
    return rank_pool.load(CORPUS)


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    records = corpus.write_records(folder / "birds.jsonl", 24)
    manifest = corpus.build(corpus.ManifestSource(root=records), folder / "birds", corpus.BuildOptions())
    corpus.train_tokenizer([manifest], 400, folder / "t.model")
    return Tokenizer.load(folder / "t.model")


@pytest.fixture(scope="module")
def build(tokenizer):
    """A run with a random model whose logits are of size 1, so that a difference of 1e-5 in them means something."""

    def build(**options) -> LoadedRun:
        shape = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16, "init_std": 0.2}
        data = DataConfig(
            sources=[SourceConfig(name="none", shards="none")], tokenizer="none", sequence_length=64, geometry=GEOMETRY
        )
        config = RunConfig(run_dir="none", data=data, model=ModelConfig(**(shape | options)))
        features = {name: modality.features(GEOMETRY) for name, modality in MODALITIES.items()}
        model = MultimodalTransformer(config.model, vocab_size=tokenizer.vocab_size, media_features=features, seed=1)
        model = model.eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)  # cross-attention starts closed
        return LoadedRun(config=config, model=model, tokenizer=tokenizer, step=0, run_dir=Path("none"))

    return build


@pytest.fixture(scope="module")
def prompts(corpus):
    """Prompts of different lengths: interleaved, text alone, ending in a picture, in a sound, nothing at all."""
    image = probe_media("image", corpus.image_bytes(1, width=24, height=16), name="bird")
    tall = probe_media("image", corpus.image_bytes(2, width=8, height=40), name="tree")
    audio = probe_media("audio", corpus.audio_bytes(3), name="song")
    return [[image, "A bird ", audio, "sings"], ["Ein kleiner Vogel"], ["the ", tall], [audio, image, audio], []]


def packed(run: LoadedRun, prompts):
    return prompt_batch(prompts, tokenizer=run.tokenizer, geometry=GEOMETRY)


def forced(run: LoadedRun, prompts, tokens: list[int], *, cache: bool) -> torch.Tensor:
    """Return the logits [steps, B, V] while all rows are continued with the same tokens."""
    with torch.inference_mode():
        continuation = Continuation(run.model, packed(run, prompts), cache=cache)
        steps = [continuation.logits]
        for token in tokens:
            continuation.append(torch.full((len(prompts),), token))
            steps.append(continuation.logits)
    return torch.stack(steps)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "reference"},
        {"attention": "sdpa"},
        {"softcap": 5.0, "tie_embeddings": True, "kv_heads": 4},
        *FUSIONS.values(),
    ],
    ids=["reference", "sdpa", "softcap", *FUSIONS],
)
def test_cached_logits_are_those_of_the_packed_model_and_of_recomputation(build, prompts, options, monkeypatch):
    monkeypatch.setattr(kv_cache, "FIRST_SLOTS", 1)  # so that the slots have to grow
    run = build(**options)
    tokens = run.tokenizer.encode(TAIL).tolist()
    cached, recomputed = (forced(run, prompts, tokens, cache=cache) for cache in (True, False))
    assert cached.std() > 0.5
    torch.testing.assert_close(cached, recomputed, rtol=0, atol=1e-5)
    for row, parts in enumerate(prompts):
        whole = packed(run, [[*parts, TAIL]])
        with torch.no_grad():
            logits = run.model.logits(run.to_device(whole))[0, -len(tokens) - 1 :]
        torch.testing.assert_close(cached[:, row], logits, rtol=0, atol=1e-5)


def test_prompts_go_through_encoders(build, prompts):
    """Rows that end leave the encoders fewer items, without the tables that were made for all."""
    sizes = {"width": 16, "layers": 1, "heads": 2, "merge": 2}
    image = EncoderConfig(kind="vit", connector="perceiver", **sizes)
    audio = EncoderConfig(kind="transformer", connector="pixel_shuffle", **sizes)
    run = build(encoders={"image": image, "audio": audio})
    results = {}
    for cache in (True, False):
        with torch.inference_mode():
            continuation = Continuation(run.model, packed(run, prompts), cache=cache)
            continuation.append(torch.full((5,), 7))
            continuation.keep([0, 2])
            continuation.append(torch.full((2,), 8))
            results[cache] = continuation.logits
    torch.testing.assert_close(results[True], results[False], rtol=0, atol=1e-5)
    assert (forced(build(), prompts, [7, 8], cache=True)[1][[0, 2]] - results[True]).abs().max() > 0.1


def test_the_cache_computes_one_position_a_step(build, prompts):
    run = build()
    widths = []
    hook = run.model.decoder.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape[1]))
    forced(run, prompts, [7, 8, 9], cache=True)
    hook.remove()
    assert widths[1:] == [1, 1, 1]
    assert widths[0] > 10


@pytest.mark.parametrize("options", [{}, *FUSIONS.values()], ids=["sequence", *FUSIONS])
@pytest.mark.parametrize("cache", [True, False])
def test_rows_that_stay_do_not_notice_those_that_go(build, prompts, cache, options):
    run = build(**options)
    with torch.inference_mode():
        alone = forced(run, [prompts[0], prompts[2]], [7, 8, 9], cache=cache)
        continuation = Continuation(run.model, packed(run, prompts), cache=cache)
        continuation.append(torch.full((5,), 7))
        continuation.keep([0, 2])
        for token, wanted in ((8, alone[2]), (9, alone[3])):
            continuation.append(torch.full((2,), token))
            torch.testing.assert_close(continuation.logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.95, "seed": 4}], ids=["greedy", "sampled"])
def test_a_batch_is_what_its_prompts_are_alone(build, prompts, options):
    run = build()
    batch = generate(run, prompts, max_tokens=24, **options)
    assert generate(run, prompts, max_tokens=24, batch_rows=1, **options) == batch
    assert generate(run, prompts, max_tokens=24, batch_rows=2, cache=False, **options) == batch
    assert len({tuple(result.tokens) for result in batch}) == len(prompts)
    for row, parts in enumerate(prompts):
        together = forced(run, prompts, [7, 8], cache=True)[:, row]
        torch.testing.assert_close(forced(run, [parts], [7, 8], cache=True)[:, 0], together, rtol=0, atol=1e-5)
    if not options:
        assert [generate(run, [parts], max_tokens=24)[0] for parts in prompts] == batch


def test_results_say_what_they_are(build, prompts):
    run = build()
    results = generate(run, prompts, max_tokens=5)
    lengths = [int((packed(run, [parts]).kv_hi > 0).sum()) for parts in prompts]
    assert [result.prompt_tokens for result in results] == lengths
    for result in results:
        assert result.text == run.tokenizer.decode(result.tokens)
        assert result.finish_reason == ("length" if len(result.tokens) == 5 else "eos")
    assert generate(run, [], max_tokens=5) == []


def test_sampling_is_a_function_of_the_seed(build, prompts):
    run = build()

    def sample(seed):
        return generate(run, prompts[:2], max_tokens=12, temperature=2.0, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    twice = generate(run, [prompts[1]] * 2, max_tokens=12, temperature=2.0)
    assert twice[0].tokens != twice[1].tokens  # equal prompts draw from streams of their own


def test_eos_ends_a_row_and_is_not_part_of_it(build, prompts):
    run = build()
    results = generate(run, prompts * 4, max_tokens=300, temperature=50.0, seed=2)  # nearly uniform over 400 tokens
    reasons = [result.finish_reason for result in results]
    assert set(reasons) == {"eos", "length"}
    for result in results:
        assert run.tokenizer.eos_id not in result.tokens
        assert (len(result.tokens) < 300) == (result.finish_reason == "eos")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_no_text_has_are_never_made(build, prompts, temperature):
    run = build()
    head, tokenizer = run.model.heads["language_model"], run.tokenizer
    never = sorted(tokenizer.unwritable - {tokenizer.eos_id})
    assert {tokenizer.pad_id, tokenizer.bos_id, tokenizer.media["image"].start_id} <= set(never)
    assert {tokenizer.media["audio"].placeholder_id, tokenizer.markers["<|end|>"]} <= set(never)
    with torch.inference_mode():
        hidden = run.model.hidden(to_device(packed(run, prompts[:1]), "cpu"))[0, -1]
        head.weight[never] = 3 * hidden
        assert int(head.logits(hidden).argmax()) in never
    for result in generate(run, prompts, max_tokens=20, temperature=temperature):
        assert not set(result.tokens) & tokenizer.unwritable


def drawn(probabilities: list[float], sampling: Sampling, draws: int = 4000) -> np.ndarray:
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(draws, -1)
    stream = sampling.stream(0)
    return np.bincount(draw(logits, sampling, [stream] * draws).numpy(), minlength=len(probabilities)) / draws


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    masses = [0.1, 0.4, 0.05, 0.3, 0.15]
    np.testing.assert_allclose(drawn(masses, Sampling(temperature=1.0)), masses, atol=0.03)
    # 0.4 + 0.3 is short of 0.75, so the third is in; the rest is cut and the kept are renormalised
    kept = np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85
    np.testing.assert_allclose(drawn(masses, Sampling(temperature=1.0, top_p=0.75)), kept, atol=0.03)
    np.testing.assert_allclose(
        drawn(masses, Sampling(temperature=1.0, top_p=0.65)), np.array([0, 4, 0, 3, 0]) / 7, atol=0.03
    )
    assert drawn(masses, Sampling(temperature=1.0, top_p=1e-9))[1] == 1
    assert drawn(masses, Sampling(temperature=1e-300))[1] == 1
    squared = np.square(masses) / np.square(masses).sum()
    np.testing.assert_allclose(drawn(masses, Sampling(temperature=0.5)), squared, atol=0.03)


def test_ties_go_to_the_smaller_id_and_impossible_tokens_are_not_drawn():
    logits = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    assert draw(logits, Sampling(), []).tolist() == [1, 0]
    assert drawn([0.5, 0.0, 0.5], Sampling(temperature=1.0))[1] == 0
    for lost in (float("nan"), float("inf")):
        with pytest.raises(PretrainError, match="training diverged"):
            draw(torch.tensor([[0.0, lost, -float("inf")]]), Sampling(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"batch_rows": 0}, "batch_rows is 0"),
    ],
)
def test_options_out_of_range_are_refused(build, options, message):
    with pytest.raises(PretrainError, match=message):
        generate(build(), [["a"]], **({"max_tokens": 4} | options))


def test_the_strips_of_a_step_are_those_of_the_kernels():
    keys = torch.tensor([5, 1, 300])
    wanted = attention_tables(np.zeros((3, 1), np.int32), keys.int().unsqueeze(1).numpy())["segments"]
    assert np.array_equal(continuations._one_query_strips(keys), wanted)


def test_the_benchmark_times_the_same_tokens():
    times = bench_generate(6, 1, config=ModelConfig(d_model=32, layers=1, heads=2, kv_heads=1, head_width=16))
    assert times.tokens == 6
    assert times.cached_s > 0
    assert times.ratio == pytest.approx(times.recomputed_s / times.cached_s)


@pytest.mark.parametrize("options", [FUSIONS["preceding"], FUSIONS["mmca"]], ids=["cross", "mmca"])
def test_the_nats_of_a_text_are_those_of_its_own_row(build, prompts, options):
    """Evaluation finds its states where the model reads them, not where the batch was packed."""
    run = build(**options)
    rows = [[*parts, TAIL] for parts in prompts]
    nats, counts = caption_nll._row_nlls(run, packed(run, rows))
    for place, row in enumerate(rows):
        whole = packed(run, [row])
        with torch.no_grad():
            logits = run.model.logits(run.to_device(whole))[0]
        tokens = torch.from_numpy(run.tokenizer.encode(TAIL).copy()).long()
        wanted = torch.nn.functional.cross_entropy(logits[-len(tokens) - 1 : -1], tokens, reduction="none")
        alone = caption_nll._row_nlls(run, whole)
        assert counts[place] == alone[1][0] >= len(tokens)
        assert nats[place] == pytest.approx(float(alone[0][0]), rel=1e-5)
        assert nats[place] >= float(wanted.sum()) - 1e-3
        if counts[place] == len(tokens):
            assert nats[place] == pytest.approx(float(wanted.sum()), rel=1e-5)
