"""The kinds of fusion over the same packs: what ties them to each other, isolation, participation, zero loss."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from triweave.pretrain.batch import as_read, kernel_tables, to_device
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.fusion.arrangement import for_cross
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.fusion.cross import place_vectors
from triweave.pretrain.model.config import LayoutConfig, ModelConfig
from triweave.pretrain.model.flops import count_flops
from triweave.pretrain.model.model import MultimodalTransformer

SMALL = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16}
CROSS = FusionConfig(kind="cross", cross_every=1)
PRECEDING = FusionConfig(kind="cross", cross_every=2, scope="preceding")
RESAMPLED = FusionConfig(kind="cross", cross_every=2, resampler_latents=3)
RESAMPLED_ALL = FusionConfig(kind="cross", scope="preceding", resampler_latents=2, resampler_layers=1)
MMCA = FusionConfig(kind="mmca")
ALL = {
    "immediate": CROSS,
    "preceding": PRECEDING,
    "resampled": RESAMPLED,
    "resampled-all": RESAMPLED_ALL,
    "mmca": MMCA,
}
every_kind = pytest.mark.parametrize("fusion", ALL.values(), ids=ALL)
every_cross = pytest.mark.parametrize("fusion", [f for f in ALL.values() if f.kind == "cross"], ids=list(ALL)[:-1])

cross_and_mmca = pytest.mark.parametrize("fusion", [RESAMPLED, MMCA], ids=["resampled", "mmca"])


@pytest.fixture
def build(synthetic):
    """A model whose gates stand open, unless told otherwise."""

    def build(fusion=None, *, gate=0.7, **options):
        config = ModelConfig(**(SMALL | options), fusion=fusion or FusionConfig())
        model = MultimodalTransformer(config, vocab_size=synthetic.VOCAB_SIZE, media_features=synthetic.FEATURES)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(gate)
        return model

    return build


@pytest.fixture
def documents(synthetic):
    """Four documents: image, audio and image, audio, text only, image."""
    generator = np.random.default_rng(7)
    kinds = (("image", "audio", "image"), ("audio",), (), ("image",))
    return [synthetic.random_document(generator, kind, synthetic.FEATURES) for kind in kinds]


def read(model, batch):
    """Return the batch as the model's loader hands it over."""
    tables = kernel_tables(model.config, torch.device("cpu"), torch.float32)
    return to_device(dataclasses.replace(batch, extra=tables(batch)), "cpu")


def gradients(model, batch, guards=frozenset()):
    model.zero_grad(set_to_none=True)
    sums = model(read(model, batch), guards)
    sums.total.backward()
    return sums, {name: parameter.grad for name, parameter in model.named_parameters()}


def difference(model, before, after):
    """Return the largest difference of the logits at each position that the model reads, of the first row."""
    with torch.no_grad():
        return (model.logits(read(model, before)) - model.logits(read(model, after))).abs().amax(-1)[0]


def documents_read(model, batch):
    tables = kernel_tables(model.config, torch.device("cpu"), torch.float32)
    return as_read(dataclasses.replace(batch, extra=tables(batch)))


def walk(batch, row, fusion):
    """Return (place in the pack, text and tags seen, media tokens seen) of each position the trunk keeps."""
    span, document = batch.span_ids[row], batch.document_ids[row]
    S = len(span)
    keep = [i for i in range(S) if document[i] >= 0 and (span[i] < 0 or i + 1 == S or span[i + 1] != span[i])]
    found = []
    for i in keep:
        seen = list(range(batch.kv_lo[row, i], batch.kv_hi[row, i]))
        media = [j for j in seen if span[j] >= 0]
        if fusion.scope == "immediate" and media:
            media = [j for j in media if span[j] == span[media[-1]]]
        found.append((i, [j for j in seen if j in keep], media))
    return found


@pytest.mark.parametrize("latents", [None, 3])
@pytest.mark.parametrize("scope", ["immediate", "preceding"])
def test_the_arrangement_is_what_walking_the_pack_gives(synthetic, documents, scope, latents):
    item = synthetic.Document(parts=[[20, 21], documents[0].parts[1]], alone=True)
    batch = synthetic.pack([[documents[1], documents[0]], [], [documents[2], item, documents[3]]], 96)
    fusion = FusionConfig(kind="cross", scope=scope, resampler_latents=latents)
    arranged, axis = for_cross(batch, fusion)
    for row in range(3):
        wanted = walk(batch, row, fusion)
        kept = [place for place, _, _ in wanted]
        media = [j for j in range(96) if batch.span_ids[row, j] >= 0]
        items = sorted({int(batch.span_ids[row, j]) for j in media})
        assert arranged.tokens[row, : len(kept)].tolist() == batch.tokens[row, kept].tolist()
        assert (arranged.kv_hi[row, len(kept) :] == 0).all()
        for new, (_, text, looked_at) in enumerate(wanted):
            lo, hi = int(arranged.kv_lo[row, new]), int(arranged.kv_hi[row, new])
            assert [kept[j] for j in range(lo, hi)] == text
            assert arranged.positions[row, new].tolist() == [new - kept.index(text[0])] * 3
            keys = range(int(arranged.media_lo[row, new]), int(arranged.media_hi[row, new]))
            if latents is None:
                assert [media[key] for key in keys] == looked_at
            else:
                spans = sorted({int(batch.span_ids[row, j]) for j in looked_at})
                assert sorted({items[key // 3] for key in keys}) == spans
                assert len(keys) == 3 * len(spans)
        for number, span in enumerate(items if latents else []):
            own = [media.index(j) for j in media if batch.span_ids[row, j] == span]
            T, L = axis.positions.shape[1], axis.latent_lo.shape[1]
            joint = axis.joint.reshape(3, T + L)[row] - row * (T + L)
            seen = joint[axis.latent_lo[row, 3 * number] : axis.latent_hi[row, 3 * number]]
            assert seen.tolist() == own + [T + 3 * number + latent for latent in range(3)]
    assert (np.sort(axis.joint) == np.arange(len(axis.joint))).all()
    assert arranged.targets.tolist() == batch.targets.tolist()
    before = [(place // 96, place % 96) for place in batch.row_index.tolist()]
    after = np.divmod(arranged.row_index, arranged.tokens.shape[1])
    for (row, place), new_row, new in zip(before, *after, strict=True):
        assert (row, walk(batch, row, fusion)[new][0]) == (new_row, place)
    for name, payload in batch.payloads.items():
        flat = arranged.payloads[name].token_index
        rows, keys = np.divmod(flat, axis.positions.shape[1])
        for place, row, key in zip(payload.token_index.tolist(), rows, keys, strict=True):
            assert [row * 96 + j for j in range(96) if batch.span_ids[row, j] >= 0][key] == place


def test_media_tokens_keep_their_place_within_their_item(synthetic):
    image = synthetic.Media(modality="image", grid=(1, 2, 3), values=np.zeros((6, 12), np.uint8))
    sound = synthetic.Media(modality="audio", grid=(2, 1, 1), values=np.zeros((2, 10), np.float32))
    _, axis = for_cross(synthetic.pack([[synthetic.Document(parts=[[20, 21], image, sound])]], 32), CROSS)
    assert axis.positions[0].tolist() == [[0, h, w] for h in (0, 1) for w in (0, 1, 2)] + [[0, 0, 0], [1, 0, 0]]
    vectors = place_vectors(torch.from_numpy(axis.positions), 32)
    assert vectors.shape == (1, 8, 32)
    assert len({tuple(row) for row in vectors[0, :6].tolist()}) == 6
    assert torch.count_nonzero(vectors[..., 30:]) == 0


@every_cross
def test_with_closed_gates_the_model_is_the_text_only_one(build, synthetic, documents, fusion):
    """To the bit: each medium is one more token of a text, and the trunk's weights are those of kind sequence."""
    model, plain = build(fusion, gate=0.0), build()
    texts = []
    for document in documents:
        parts = [
            part if isinstance(part, list) else [2 * synthetic.MODALITY_IDS[part.modality] + 1, tag(part, synthetic)]
            for part in document.parts
        ]
        texts.append(synthetic.Document(parts=parts))
    looked, _ = for_cross(synthetic.pack([documents], 128), fusion)
    sums, grads = gradients(model, synthetic.pack([documents], 128))
    text = synthetic.pack([texts], looked.tokens.shape[1])
    # the start markers predict a tag here, which nothing does where media stand in the text
    supervised = np.isin(text.row_index, looked.row_index)
    text = dataclasses.replace(
        text,
        **{
            name: getattr(text, name)[supervised]
            for name in ("row_index", "targets", "row_weight", "row_modality", "row_source")
        },
    )
    plain_sums, plain_grads = gradients(plain, text)
    assert torch.equal(sums.total, plain_sums.total)
    for name, gradient in plain_grads.items():
        if not name.startswith("towers."):
            assert torch.equal(grads[name], gradient), name
    gates = [gradient for name, gradient in grads.items() if name.endswith("gate")]
    assert gates
    assert all(torch.count_nonzero(gradient) for gradient in gates), "a closed gate must be able to open"


def tag(media, synthetic):
    return 2 * synthetic.MODALITY_IDS[media.modality] + 2


def test_mmca_with_text_alone_is_causal_attention(build, synthetic, documents):
    batch = synthetic.pack([[documents[2], documents[2]]], 40)
    for layout in ({}, {"activation_checkpointing": True}):
        sums, grads = gradients(build(MMCA, **layout), batch)
        plain, plain_grads = gradients(build(**layout), batch)
        torch.testing.assert_close(sums.total, plain.total, rtol=1e-6, atol=0)
        for name, gradient in plain_grads.items():
            if gradient is not None:
                torch.testing.assert_close(
                    grads[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()), msg=name
                )


def test_mmca_media_see_their_own_item_only_and_text_sees_both(build, synthetic, documents):
    model = build(MMCA)
    batch = synthetic.pack([documents[:1]], 64)
    audio = np.flatnonzero(batch.span_ids[0] == 1)
    after = int(audio[-1]) + 1
    reach = {}
    for query in (int(audio[0]), after):
        embedded = {}

        def grab(_module, arguments, embedded=embedded):
            embedded["x"] = arguments[0].detach().requires_grad_()
            return (embedded["x"], *arguments[1:])

        hook = model.decoder.register_forward_pre_hook(grab)
        model.hidden(read(model, batch))[0, query].square().sum().backward()
        hook.remove()
        reach[query] = torch.nonzero(embedded["x"].grad[0].abs().amax(-1)).flatten().tolist()
    assert reach[int(audio[0])] == audio.tolist()
    assert reach[after] == list(range(after + 1))


@every_kind
@pytest.mark.parametrize("part", [0, 1, 3], ids=["text", "image", "audio"])
def test_changing_one_document_changes_the_others_by_exactly_0(build, synthetic, documents, fusion, part):
    model = build(fusion)
    before = synthetic.pack([documents], 128)
    after = synthetic.pack([[synthetic.changed(documents[0], part), *documents[1:]]], 128)
    apart = difference(model, before, after)
    first = torch.from_numpy(documents_read(model, before).document_ids[0] == 0)
    assert apart[first].max() > 1e-5
    assert apart[~first].max() == 0


@every_kind
def test_future_media_do_not_reach_earlier_logits(build, synthetic, documents, fusion):
    model = build(fusion)
    before, after = synthetic.pack([documents[:1]], 64), synthetic.pack([[synthetic.changed(documents[0], 3)]], 64)
    seen = documents_read(model, before)
    first = int(np.flatnonzero(seen.span_ids[0] == 1)[0])
    apart = difference(model, before, after)
    assert apart[:first].max() == 0
    later = torch.from_numpy((seen.document_ids[0] == 0) & (seen.span_ids[0] < 0))[first:]
    assert apart[first:][later].min() > 0
    assert apart[first] > 0


def test_the_immediate_scope_looks_at_the_latest_medium_the_preceding_one_at_all(build, synthetic, documents):
    """One layer: what a token gets of a medium is what it looks at itself."""
    for fusion, sees_first in ((CROSS, False), (dataclasses.replace(PRECEDING, cross_every=1), True)):
        model = build(fusion, layers=1)
        before, after = (
            synthetic.pack([[document]], 64) for document in (documents[0], synthetic.changed(documents[0], 1))
        )
        apart = difference(model, before, after)
        last = int((documents_read(model, before).document_ids[0] == 0).sum()) - 1
        with torch.no_grad():
            for block in model.decoder.blocks:
                block.attention.out.weight.zero_()  # the text itself carries nothing on
        alone = difference(model, before, after)
        assert apart[last] > 0
        assert (alone[last] > 0) == sees_first


@every_kind
def test_packed_documents_have_the_losses_they_have_alone(build, synthetic, documents, fusion):
    """In fp64: the latents' norm has a gradient whose terms cancel, 1.3e-6 of its largest in fp32."""
    model = build(fusion).double()
    packed, packed_grads = gradients(model, synthetic.pack([documents[:2], documents[2:], []], 96))
    alone = [gradients(model, synthetic.alone(document)) for document in documents]
    torch.testing.assert_close(packed.total, sum(sums.total for sums, _ in alone), rtol=1e-12, atol=0)
    for name, gradient in packed_grads.items():
        added = sum(grads[name] for _, grads in alone if grads[name] is not None)
        torch.testing.assert_close(gradient, added, rtol=0, atol=1e-12 * float(added.abs().max()), msg=name)


@cross_and_mmca
@pytest.mark.parametrize("poison", [1.0, float("nan")])
def test_a_guarded_tower_changes_no_bit_and_gets_gradients_of_exactly_zero(build, make_batch, fusion, poison):
    model, batch = build(fusion), make_batch([("image",), ()])
    plain, plain_grads = gradients(model, batch)
    sums = model(read(model, batch), frozenset({"image", "audio"}))
    model.zero_grad(set_to_none=True)
    (sums.total * poison).backward()
    assert torch.equal(sums.total, plain.total)
    for name, parameter in model.named_parameters():
        if name.startswith("towers.audio."):
            assert plain_grads[name] is None
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
        elif poison == 1.0:
            assert torch.equal(parameter.grad, plain_grads[name]), name


@every_kind
@pytest.mark.parametrize("rows", [[(), ()], [None, None]], ids=["text", "padding"])
def test_every_trunk_parameter_takes_part_without_media(build, make_batch, fusion, rows):
    """Else a rank without media would reduce other tensors than its peers; what looks at media gets zeros."""
    sums, grads = gradients(build(fusion), make_batch(rows))
    assert {name for name, grad in grads.items() if grad is None} == {n for n in grads if n.startswith("towers.")}
    assert all(gradient.isfinite().all() for gradient in grads.values() if gradient is not None)
    for name, gradient in grads.items():
        if "media_keys" in name or ("cross_blocks" in name and ".attention." in name):
            assert torch.count_nonzero(gradient) == 0, name
    assert (sums.total == 0) == (rows[0] is None)


@cross_and_mmca
def test_recomputing_blocks_changes_no_bit(build, make_batch, fusion):
    sums, grads = gradients(build(fusion), make_batch())
    again, recomputed = gradients(build(fusion, activation_checkpointing=True), make_batch())
    assert torch.equal(again.total, sums.total)
    assert all(torch.equal(recomputed[name], grads[name]) for name in grads)


@every_kind
def test_tables_of_the_loader_give_what_the_kernels_make_by_themselves(build, make_batch, fusion):
    model = build(fusion)
    tabled = read(model, make_batch())
    bare = dataclasses.replace(tabled, tiles=None, media_tiles=None, latent_tiles=None)
    assert tabled.tiles
    assert bool(tabled.media_tiles) == (fusion.kind == "cross")
    assert torch.equal(model(tabled).total, model(bare).total)


@cross_and_mmca
def test_bf16_is_finite_and_near_fp32(build, make_batch, fusion):
    exact, _ = gradients(build(fusion), make_batch())
    sums, grads = gradients(build(fusion).bfloat16(), make_batch())
    torch.testing.assert_close(sums.total.float(), exact.total, rtol=1e-2, atol=0)
    assert all(gradient.isfinite().all() for gradient in grads.values() if gradient is not None)


@cross_and_mmca
def test_segments_are_pooled_over_what_the_model_reads_of_them(build, synthetic, documents, fusion):
    """A partner changed changes the other embeddings by exactly 0, packed or alone they are the same."""
    model = build(fusion, objectives={"language_model": 1.0, "contrastive": 1.0})
    item = synthetic.Document(parts=[[20, 21, 22], documents[0].parts[1], documents[0].parts[3]], alone=True)
    other = synthetic.Document(parts=synthetic.changed(item, 1).parts, alone=True)
    with torch.no_grad():
        before, after, single = (
            model.embed(read(model, synthetic.pack([rows], 96)))
            for rows in ([documents[1], item], [documents[1], other], [item])
        )
    assert (before - after).abs().amax(1)[1] > 1e-4
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    torch.testing.assert_close(before, single, rtol=1e-5, atol=1e-6)


def test_a_batch_arranged_for_another_fusion_is_refused(build, make_batch):
    plain = read(build(), make_batch())
    for fusion in ALL.values():
        with pytest.raises(PretrainError, match="make it with the model's kernel_tables"):
            build(fusion)(plain)
    with pytest.raises(PretrainError, match="make it with the model's kernel_tables"):
        build(PRECEDING)(read(build(CROSS), make_batch()))


def test_the_trunk_has_the_names_and_weights_of_kind_sequence(build):
    plain = build().state_dict()
    for fusion in ALL.values():
        fused = build(fusion).state_dict()
        assert all(torch.equal(fused[name], value) for name, value in plain.items())
        added = {name.split(".")[0] + "." + name.split(".")[1] for name in set(fused) - set(plain)}
        resampler = {"media_keys.resampler"} if fusion.resampler_latents else set()
        assert added == ({"decoder.cross_blocks", "media_keys.norm"} | resampler if fusion.kind == "cross" else set())
    assert len(build(PRECEDING).decoder.cross_blocks) == 1
    assert len(build(CROSS).decoder.cross_blocks) == 2
    assert torch.count_nonzero(build(CROSS, gate=0.0).decoder.cross_blocks[0].attention.gate) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross_every": 0}, "model.fusion.cross_every is 0; it must be at least 1"),
        ({"resampler_latents": 0}, "model.fusion.resampler_latents is 0; it must be at least 1, or null"),
        ({"resampler_layers": 0}, "model.fusion.resampler_layers is 0"),
        ({"scope": "preceding"}, "scope is preceding but only kind cross reads it; set model.fusion.kind=cross"),
        ({"kind": "mmca", "resampler_latents": 4}, "resampler_latents is 4 but only kind cross reads it"),
        ({"kind": "cross", "cross_every": 3}, "cross_every is 3 but model.layers is 2, .* use at most 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(build, settings, message):
    with pytest.raises(PretrainError, match=message):
        build(FusionConfig(**settings))


def test_cross_attention_refuses_a_layout_of_media_tokens_in_the_text(build):
    with pytest.raises(PretrainError, match=r"no media stand in the text.*; remove model\.layout"):
        build(CROSS, layout=LayoutConfig(positions="sequential"))


@pytest.mark.parametrize("kind", ["cross", "mmca"])
@pytest.mark.parametrize("attention", ["flex", "flash"])
def test_attention_backends_without_the_op_are_refused(build, kind, attention):
    with pytest.raises(PretrainError, match=f"model.attention is '{attention}'.* use auto, reference, sdpa or triton"):
        build(FusionConfig(kind=kind), attention=attention)


@every_kind
def test_flops_are_what_torch_counts(build, synthetic, documents, fusion):
    """Projections by torch's own counter, which sees the modules; attention by walking over what each query sees."""
    model = build(fusion)
    item = synthetic.Document(parts=[[20, 21], documents[0].parts[1]], alone=True)
    batch = synthetic.pack([[documents[1], item], [documents[3], documents[0]]], 64)
    flops = count_flops(batch, model.config, synthetic.VOCAB_SIZE)
    # every row, key and latent that torch multiplies is real, but for the padding that is counted off here
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.hidden(read(model, synthetic.alone(documents[0])))
    counted = counter.get_flop_counts()["Global"]
    alone = count_flops(synthetic.alone(documents[0]), model.config, synthetic.VOCAB_SIZE)
    heads = 4 * SMALL["heads"] * SMALL["head_width"]
    pairs, looks, latents = seen_by_walking(synthetic.alone(documents[0]), fusion)
    layers = 0 if fusion.kind == "mmca" else model.config.cross_layers
    resampled = fusion.resampler_layers if fusion.resampler_latents else 0
    mixing = heads * (layers * looks + resampled * latents)
    assert alone.attention == heads * SMALL["layers"] * pairs
    products = counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    assert products == alone.projections + alone.towers + alone.cross - mixing
    assert flops.attention == heads * SMALL["layers"] * seen_by_walking(batch, fusion)[0]
    assert count_flops(synthetic.pack([[]], 8), model.config, synthetic.VOCAB_SIZE).forward == 0


def seen_by_walking(batch, fusion):
    """Return the pairs of the trunk's attention, of the cross-attention and of the resampler."""
    pairs = looks = latents = 0
    for row in range(len(batch.tokens)):
        span = batch.span_ids[row]
        if fusion.kind == "mmca":
            for i in np.flatnonzero(batch.document_ids[row] >= 0):
                keys = range(batch.kv_lo[row, i], batch.kv_hi[row, i])
                pairs += len(keys) if span[i] < 0 else sum(span[j] == span[i] for j in keys)
            continue
        for _, text, media in walk(batch, row, fusion):
            pairs += len(text)
            looks += (
                len({span[j] for j in media}) * fusion.resampler_latents if fusion.resampler_latents else len(media)
            )
        for item in set(span[span >= 0].tolist()):
            count = fusion.resampler_latents or 0
            latents += count * (count + int((span == item).sum()))
    return pairs, looks, latents
