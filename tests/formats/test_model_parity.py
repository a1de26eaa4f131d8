"""Models as transformers saves them: what each parameter is, and what is tied."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import ModelDirectory, WholeModelFormat

SMALL = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
T5 = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=12)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "llama, tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
}
OUTPUT = {"gpt2": "lm_head", "llama, tied": "lm_head", "bert": "cls.predictions.decoder", "t5": "lm_head"}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    transformers.set_seed(0)
    model = MODELS[request.param]()
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return request.param, model, path


def test_every_parameter_is_found_and_told_by_its_kind(saved):
    _, model, path = saved
    base = ModelDirectory(path)
    layers, names = dict(model.named_modules()), dict(model.named_parameters())
    assert set(base.source.specs) <= set(names) | set(dict(model.named_buffers()))
    assert {base.key_of(module) for module in base.modules} == set(base.source.specs)
    for name, header in base.modules.items():
        layer = layers.get(name)
        kind = {nn.Linear: "matrix", Conv1D: "matrix", nn.Embedding: "embedding"}.get(type(layer), "vector")
        assert header.kind == kind, name
        if isinstance(layer, nn.Linear):
            assert (header.d_out, header.d_in) == (layer.out_features, layer.in_features), name
        assert base.is_transposed(name) == isinstance(layer, Conv1D), name
        if isinstance(layer, Conv1D):
            assert (header.d_in, header.d_out) == tuple(layer.weight.shape), name


def test_an_output_is_refused_where_transformers_ties_it(saved):
    name, _, path = saved
    if name in OUTPUT:
        with pytest.raises(CheckpointError, match="an output layer that is tied to the embedding"):
            ModelDirectory(path).keys_for([OUTPUT[name]])
    else:
        assert ModelDirectory(path).keys_for(["lm_head"]) == {"lm_head": "lm_head.weight"}


def test_a_fine_tune_that_stores_every_copy_is_the_same(saved, tmp_path):
    _, model, path = saved
    tuned = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()}
    torch.save(tuned, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    base = ModelDirectory(path)
    fine_tune = WholeModelFormat().open(tmp_path, label="tuned").against(base, torch.float32)
    assert set(fine_tune.modules) == set(base.modules)
    for name, header in fine_tune.modules.items():
        delta = fine_tune.read(name).rows(slice(0, header.d_out))
        assert torch.allclose(delta, torch.ones(header.d_out, header.d_in), atol=1e-5)
