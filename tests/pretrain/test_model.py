"""The model's promises about isolation, participation and zero loss, on synthetic packs in fp32."""

import numpy as np
import pytest
import torch

from triweave.pretrain.batch import to_device
from triweave.pretrain.encoders.patch import PatchEmbedder
from triweave.pretrain.encoders.registry import ENCODERS
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.objectives.losses import weight_by_slot

SMALL = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16}


@pytest.fixture
def build(synthetic):
    def build(features=None, seed=0, **options):
        config = ModelConfig(**(SMALL | options))
        media_features = synthetic.FEATURES if features is None else features
        return MultimodalTransformer(config, vocab_size=synthetic.VOCAB_SIZE, media_features=media_features, seed=seed)

    return build


@pytest.fixture
def documents(synthetic):
    """Four documents: image and audio, audio, text only, image."""
    generator = np.random.default_rng(7)
    kinds = (("image", "audio"), ("audio",), (), ("image",))
    return [synthetic.random_document(generator, kind, synthetic.FEATURES) for kind in kinds]


def gradients(model, batch, guards=frozenset()):
    model.zero_grad(set_to_none=True)
    sums = model(to_device(batch, "cpu"), guards)
    sums.total.backward()
    return sums, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("part", [0, 1, 3], ids=["text", "image", "audio"])
def test_changing_one_document_leaves_the_others_logits_bit_identical(build, synthetic, documents, part):
    model = build()
    before = synthetic.pack([documents], 96)
    after = synthetic.pack([[synthetic.changed(documents[0], part), *documents[1:]]], 96)
    with torch.no_grad():
        difference = (model.logits(to_device(before, "cpu")) - model.logits(to_device(after, "cpu"))).abs().amax(-1)[0]
    in_first = torch.from_numpy(before.document_ids[0] == 0)
    assert difference[in_first].max() > 1e-4
    assert difference[~in_first].max() == 0


def test_future_media_does_not_reach_earlier_logits(build, synthetic, documents):
    model = build()
    before = synthetic.pack([documents[:1]], 40)
    after = synthetic.pack([[synthetic.changed(documents[0], 3)]], 40)
    first = int(np.flatnonzero(before.modality_ids[0] == synthetic.MODALITY_IDS["audio"])[0])
    with torch.no_grad():
        difference = (model.logits(to_device(before, "cpu")) - model.logits(to_device(after, "cpu"))).abs().amax(-1)[0]
    assert difference[:first].max() == 0
    assert difference[first : documents[0].length].min() > 0


def test_a_media_token_sees_the_later_tokens_of_its_span_and_nothing_after_it(build, synthetic, documents):
    model = build()
    batch = synthetic.pack([documents[:1]], 40)
    positions = np.flatnonzero(batch.span_ids[0] == 0)
    first, last = int(positions[0]), int(positions[-1])
    device_batch = to_device(batch, "cpu")
    embedded = {}

    def grab(_module, arguments):
        embedded["x"] = arguments[0].detach().requires_grad_()
        return (embedded["x"], *arguments[1:])

    model.decoder.register_forward_pre_hook(grab)
    model.hidden(device_batch)[0, first].square().sum().backward()
    reach = embedded["x"].grad[0].abs().amax(-1)
    assert reach[: last + 1].min() > 0
    assert reach[last + 1 :].max() == 0


def test_packed_documents_have_the_losses_they_have_alone(build, synthetic, documents):
    model = build()
    packed, packed_grads = gradients(model, synthetic.pack([documents[:2], documents[2:]], 64))
    alone = [gradients(model, synthetic.alone(document)) for document in documents]
    total = sum(sums.total for sums, _ in alone)
    torch.testing.assert_close(packed.total, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed.by_slot, sum(sums.by_slot for sums, _ in alone), rtol=1e-6, atol=1e-6)
    for name, gradient in packed_grads.items():
        added = sum(grads[name] for _, grads in alone if grads[name] is not None)
        torch.testing.assert_close(gradient, added, rtol=0, atol=1e-6 * float(added.abs().max()), msg=name)


def test_by_slot_sums_add_up_to_the_total_without_z_loss(build, make_batch):
    batch = make_batch()
    sums = build(z_loss=0.0)(to_device(batch, "cpu"))
    torch.testing.assert_close(sums.by_slot.sum(), sums.total.detach(), rtol=1e-6, atol=0)
    (weights,) = weight_by_slot(batch)
    assert weights.sum() == batch.supervised_tokens
    mean = sums.by_slot.numpy()[weights > 0] / weights[weights > 0]
    np.testing.assert_allclose(mean, np.log(64), rtol=0.1)  # an untrained model is near uniform


def test_z_loss_and_softcap_enter_the_total(build, make_batch):
    batch = to_device(make_batch(), "cpu")
    plain, with_z = build(z_loss=0.0)(batch), build(z_loss=0.5)(batch)
    expected = plain.total + 0.5 * (batch.row_weight * plain.lse.square()).sum()
    torch.testing.assert_close(with_z.total, expected, rtol=1e-6, atol=0)
    capped = build(softcap=0.01).logits(batch)
    assert capped.abs().max() <= 0.01


def test_a_text_only_batch_does_not_depend_on_the_towers(build, make_batch):
    model, batch = build(), make_batch([(), ()])
    before, grads = gradients(model, batch)
    assert {name for name, grad in grads.items() if grad is None} == {
        name for name in grads if name.startswith("towers.")
    }
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(gradients(model, batch)[0].total, before.total)


@pytest.mark.parametrize("poison", [1.0, float("inf"), float("nan")])
def test_a_guarded_tower_changes_no_bit_and_gets_gradients_of_exactly_zero(build, make_batch, poison):
    model, batch = build(), make_batch([("image",), ()])
    plain, plain_grads = gradients(model, batch)
    sums = model(to_device(batch, "cpu"), frozenset({"image", "audio"}))
    model.zero_grad(set_to_none=True)
    (sums.total * poison).backward()
    assert torch.equal(sums.total, plain.total)
    for name, parameter in model.named_parameters():
        if name.startswith("towers.audio."):
            assert plain_grads[name] is None
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
        elif poison == 1.0:
            assert torch.equal(parameter.grad, plain_grads[name]), name


def test_zero_loss_rows_contribute_exactly_nothing(build, synthetic):
    model = build()
    row, other = synthetic.make_rows([("image",), ("audio",)], length=64, seed=3, features=synthetic.FEATURES)
    filler = synthetic.with_weight(other, 0.0)
    sums, grads = gradients(model, synthetic.pack([filler, []], 64))
    assert sums.total == 0
    assert torch.count_nonzero(sums.by_slot) == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in grads.values() if gradient is not None)
    alone, alone_grads = gradients(model, synthetic.pack([row], 64))
    for neighbour in ([], filler):
        sums, grads = gradients(model, synthetic.pack([row, neighbour], 64))
        torch.testing.assert_close(sums.total, alone.total, rtol=1e-6, atol=0)
        for name, gradient in alone_grads.items():
            if gradient is not None:
                tolerance = 1e-6 * float(gradient.abs().max())
                torch.testing.assert_close(grads[name], gradient, rtol=0, atol=tolerance, msg=name)


def test_an_all_padding_micro_batch_gives_zero_loss_and_zero_gradients(build, make_batch):
    batch = make_batch([None, None])
    assert batch.row_index.size == 0
    sums, grads = gradients(build(), batch, frozenset({"image", "audio"}))
    assert sums.total == 0
    for name, gradient in grads.items():
        assert gradient is not None, name
        assert torch.count_nonzero(gradient) == 0, name


@pytest.mark.parametrize("rows", [[("image", "audio")], [None]], ids=["documents", "padding"])
def test_bf16_is_finite_and_near_fp32(build, make_batch, rows):
    batch = make_batch(rows)
    exact, _ = gradients(build(), batch)
    sums, grads = gradients(build().bfloat16(), batch)
    torch.testing.assert_close(sums.total.float(), exact.total, rtol=1e-2, atol=0)
    assert all(gradient.isfinite().all() for gradient in grads.values() if gradient is not None)


def test_initial_weights_depend_on_the_seed_and_the_name_alone(build):
    full, again = build().state_dict(), build().state_dict()
    assert all(torch.equal(full[name], again[name]) for name in full)
    without_audio = build(features={"image": 12}).state_dict()
    assert set(full) - set(without_audio) == {"towers.audio.project.weight", "towers.audio.project.bias"}
    assert all(torch.equal(full[name], without_audio[name]) for name in without_audio)
    other = build(seed=1).state_dict()
    assert all(not torch.equal(full[name], other[name]) for name in full if full[name].ndim > 1)
    blocks = [full[f"decoder.blocks.{number}.attention.qkv.weight"] for number in range(2)]
    assert not torch.equal(*blocks)


def test_residual_writers_start_smaller_with_depth(build):
    shallow, deep = build(layers=1), build(layers=4)
    ratio = (
        deep.decoder.blocks[0].feed_forward.down.weight.std() / shallow.decoder.blocks[0].feed_forward.down.weight.std()
    )
    assert ratio.item() == pytest.approx(0.5, rel=0.01)


def test_state_dict_names_are_those_checkpoints_hold(build):
    block = [
        f"decoder.blocks.0.{name}"
        for name in (
            "attention_norm.weight",
            "attention.q_norm",
            "attention.k_norm",
            "attention.qkv.weight",
            "attention.out.weight",
            "feed_forward_norm.weight",
            "feed_forward.gate_up.weight",
            "feed_forward.down.weight",
        )
    ]
    assert set(build(layers=1).state_dict()) == {
        "token_embedding.weight",
        "towers.image.project.weight",
        "towers.image.project.bias",
        "towers.audio.project.weight",
        "towers.audio.project.bias",
        "decoder.input_norm.weight",
        *block,
        "decoder.final_norm.weight",
        "heads.language_model.weight",
    }


def test_tied_embeddings_share_one_matrix_and_sum_both_gradients(build, make_batch):
    tied, untied = build(tie_embeddings=True), build()
    assert tied.heads["language_model"].weight is tied.token_embedding.weight
    assert "heads.language_model.weight" not in dict(tied.named_parameters())
    with torch.no_grad():
        untied.heads["language_model"].weight.copy_(untied.token_embedding.weight)
    tied_sums, tied_grads = gradients(tied, make_batch())
    sums, grads = gradients(untied, make_batch())
    assert torch.equal(tied_sums.total, sums.total)
    both = grads["token_embedding.weight"] + grads["heads.language_model.weight"]
    torch.testing.assert_close(tied_grads["token_embedding.weight"], both, rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_changes_no_bit(build, make_batch):
    batch = make_batch()
    sums, grads = gradients(build(), batch)
    recomputed, recomputed_grads = gradients(build(activation_checkpointing=True), batch)
    assert torch.equal(recomputed.total, sums.total)
    assert all(torch.equal(recomputed_grads[name], grads[name]) for name in grads)


def test_a_new_modality_is_one_registry_entry(build, make_batch, monkeypatch):
    class SensorEmbedder(PatchEmbedder):
        offset, scale = 0.0, 2.0

    monkeypatch.setitem(ENCODERS, "sensor", {"patch": SensorEmbedder})
    features = {"image": 12, "audio": 10, "sensor": 4}
    batch = make_batch([("sensor", "image"), ("audio",)], features=features)
    sums, grads = gradients(build(features=features), batch)
    assert torch.count_nonzero(grads["towers.sensor.project.weight"]) > 0
    assert sums.by_slot[3] > 0


def test_unknown_modalities_are_refused_by_name(build, make_batch):
    with pytest.raises(PretrainError, match="no encoder for modality 'smell'; known: image, audio"):
        build(features={"smell": 4})
    with pytest.raises(PretrainError, match="'audio' but the model has towers for image only"):
        build(features={"image": 12})(to_device(make_batch(), "cpu"))


def test_positions_of_an_image_grid_matter(build, synthetic):
    """Two grids of one shape turned: same tokens, same patches, other (h, w), other result."""
    image = synthetic.Media(modality="image", grid=(1, 2, 3), values=np.arange(72, dtype=np.uint8).reshape(6, 12))
    turned = synthetic.Media(modality="image", grid=(1, 3, 2), values=image.values)
    model = build()
    totals = [
        model(to_device(synthetic.alone(synthetic.Document(parts=[media, [20, 21]])), "cpu")).total
        for media in (image, turned)
    ]
    assert totals[0] != totals[1]


CONTRASTIVE = {"objectives": {"language_model": 1.0, "contrastive": 1.0}}


@pytest.fixture
def items(synthetic):
    """An ordinary document beside two items of text, image and audio, each part alone."""
    generator = np.random.default_rng(5)
    made = [synthetic.random_document(generator, ("image",), synthetic.FEATURES)]
    for _ in range(2):
        media = [synthetic.random_media(generator, name, synthetic.FEATURES[name]) for name in ("image", "audio")]
        made.append(synthetic.Document(parts=[[20, 21, 22], *media], alone=True))
    return made


def test_an_embedding_is_the_normalised_projection_of_the_mean_hidden_state(build, synthetic, items):
    model = build(**CONTRASTIVE)
    batch = synthetic.pack([items[1:], items[:1], items[2:]], 96)
    found = model.embed(to_device(batch, "cpu"))
    hidden = model.hidden(to_device(batch, "cpu")).flatten(0, 1)
    assert len(found) == 9
    for place, modality in enumerate(batch.segments.modality):
        first = int(batch.segments.first[place])
        pooled = hidden[first : first + int(batch.segments.lengths[place])].mean(0)
        wanted = pooled @ model.heads["contrastive"].weight[int(modality)]
        torch.testing.assert_close(found[place], wanted / wanted.norm(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(9))


@pytest.mark.parametrize("part", [0, 1, 2], ids=["text", "image", "audio"])
def test_changing_a_contrastive_partner_changes_the_other_embeddings_by_exactly_0(build, synthetic, items, part):
    """Caption, picture and sound of one item stand side by side in a row and never see each other."""
    model = build(**CONTRASTIVE)
    other = synthetic.Document(parts=synthetic.changed(items[1], part).parts, alone=True)
    before = synthetic.pack([items], 96)
    after = synthetic.pack([[items[0], other, items[2]]], 96)
    with torch.no_grad():
        difference = (model.embed(to_device(before, "cpu")) - model.embed(to_device(after, "cpu"))).abs().amax(1)
    own = (before.segments.items == 1) & (before.segments.modality == part)
    assert difference[torch.from_numpy(own)].item() > 1e-4
    assert torch.count_nonzero(difference[torch.from_numpy(~own)]) == 0


def test_every_token_of_a_segment_reaches_its_embedding(build, synthetic, items):
    model = build(**CONTRASTIVE)
    before = synthetic.pack([items[:2]], 96)
    first, length = int(before.segments.first[0]), int(before.segments.lengths[0])
    for place in range(first, first + length):
        after = synthetic.pack([items[:2]], 96)
        after.tokens[0, place] = 50
        with torch.no_grad():
            moved = (model.embed(to_device(before, "cpu")) - model.embed(to_device(after, "cpu"))).abs().amax(1)
        assert moved[0] > 1e-5, place
        assert torch.count_nonzero(moved[1:]) == 0


def test_the_contrastive_head_takes_part_without_segments(build, make_batch):
    """C = 0: embeddings [0, E], and zero gradients for the head and everything below it."""
    model = build(**CONTRASTIVE)
    sums = model(to_device(make_batch(), "cpu"))
    assert sums.embeddings.shape == (0, 128)
    (sums.embeddings.sum() + 0 * sums.calibration.sum()).backward()
    for name, parameter in model.named_parameters():
        if name != "heads.language_model.weight":
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    assert sums.total == build()(to_device(make_batch(), "cpu")).total


def test_a_zero_projection_has_a_finite_embedding_and_gradient(build, synthetic, items):
    model = build(**CONTRASTIVE)
    with torch.no_grad():
        model.heads["contrastive"].weight.zero_()
    embeddings = model.embed(to_device(synthetic.pack([items], 96), "cpu"))
    embeddings.sum().backward()
    assert torch.count_nonzero(embeddings) == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_embeddings_of_bf16_weights_are_fp32_and_near(build, synthetic, items):
    batch = to_device(synthetic.pack([items], 96), "cpu")
    exact, rounded = (model.embed(batch) for model in (build(**CONTRASTIVE), build(**CONTRASTIVE).bfloat16()))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03)


def test_the_head_starts_from_the_settings(build):
    head = build(**CONTRASTIVE).heads["contrastive"]
    assert head.weight.shape == (3, 32, 128)
    assert head.log_scale.exp().item() == pytest.approx(10)
    assert head.offset.item() == -10
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_model_without_the_contrastive_head_says_how_to_get_one(build, make_batch):
    with pytest.raises(PretrainError, match=r"heads language_model but no contrastive one, .*objectives.contrastive"):
        build().embed(to_device(make_batch(), "cpu"))
