import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from triweave.pretrain.batch import to_device
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.flops import count_flops, count_parameters
from triweave.pretrain.model.model import MultimodalTransformer

CONFIG = ModelConfig(d_model=32, layers=2, heads=4, kv_heads=2, head_width=16)


@pytest.fixture
def model(synthetic):
    return MultimodalTransformer(CONFIG, vocab_size=synthetic.VOCAB_SIZE, media_features=synthetic.FEATURES)


def test_projections_towers_and_head_are_what_torch_counts(model, synthetic):
    """Without padding torch's counter sees the same products, through the modules it can look into."""
    rows = synthetic.make_rows([("image", "audio")], length=64, seed=0, features=synthetic.FEATURES)
    batch = synthetic.alone(rows[0][0])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(to_device(batch, "cpu"))
    counted = counter.get_flop_counts()["Global"]
    flops = count_flops(batch, CONFIG, synthetic.VOCAB_SIZE)
    assert counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm] == flops.projections + flops.towers
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.heads["language_model"].logits(torch.zeros(len(batch.targets), CONFIG.d_model))
    assert counter.get_total_flops() == flops.head


def test_attention_counts_exactly_the_keys_each_query_sees(synthetic):
    document = synthetic.Document(parts=[[20, 21, 22]])  # bos, 3 tokens, eos: 1 + 2 + 3 + 4 + 5 pairs
    flops = count_flops(synthetic.alone(document), CONFIG, synthetic.VOCAB_SIZE)
    assert flops.attention == 4 * 2 * 4 * 16 * 15
    assert flops.head == 2 * 4 * 64 * 32
    assert flops.training == 3 * flops.forward


def test_the_contrastive_head_counts_one_projection_a_segment(synthetic):
    item = synthetic.Document(parts=[[20, 21], [22]], alone=True)
    batch = synthetic.pack([[item, item], [item]], 40)
    learning = dataclasses.replace(CONFIG, objectives={"language_model": 1.0, "contrastive": 0.5})
    plain, counted = (count_flops(batch, config, synthetic.VOCAB_SIZE) for config in (CONFIG, learning))
    assert (plain.contrastive, counted.contrastive) == (0, 2 * 6 * 32 * 128)
    assert counted.training - plain.training == 3 * counted.contrastive


def test_padding_costs_nothing(synthetic, make_batch):
    assert count_flops(make_batch([None]), CONFIG, synthetic.VOCAB_SIZE).forward == 0
    rows = synthetic.make_rows([("image",)], length=64, seed=1, features=synthetic.FEATURES)
    counts = [count_flops(synthetic.pack(rows, length), CONFIG, synthetic.VOCAB_SIZE) for length in (64, 96)]
    assert counts[0] == counts[1]


def test_parameters_are_counted_per_part(model):
    counts = count_parameters(model)
    assert counts["image"] == 12 * 32 + 32
    assert counts["audio"] == 10 * 32 + 32
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["trunk"] == counts["total"] - counts["image"] - counts["audio"]
