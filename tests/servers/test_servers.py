"""What each server says of an adapter: one rule a test."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lowrank.formats import Adapter, Checkpoint, PeftFormat, WholeModelFormat
from mergekit_lowrank.lowrank import LowRankUpdate
from mergekit_lowrank.policies import VLLM_RANKS
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.servers import SERVERS, accepted_ranks
from mergekit_lowrank.testing import write_tiny_adapter

ATTENTION = tuple(f"model.layers.{layer}.self_attn.{side}_proj" for layer in range(2) for side in "qkv")
Q = ATTENTION[0]
TEXT = ("vllm", "sglang", "llama.cpp")
DIFFUSION = ("diffusers", "comfyui")
UNET = tuple(f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{side}" for side in "qkv")


def linear(*modules, rank=2, shape=(8, 8)):
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = torch.ones(rank, shape[1])
        tensors[f"{module}.lora_B.weight"] = torch.ones(shape[0], rank)
    return tensors


def opened(tensors=None, **settings):
    own = linear(*ATTENTION) if tensors is None else tensors
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        **settings,
    }
    return Adapter({f"base_model.model.{key}": tensor for key, tensor in own.items()}, config).open(label="math")


def at_home(target, extra=None, **settings):
    """An adapter of a model of the kind that the server has."""
    modules = UNET if target in DIFFUSION else ATTENTION
    return opened({**linear(*modules), **(extra or {})}, **settings)


def judged(target, checkpoint, **options):
    """The verdicts but for that on the dialect."""
    return [found for found in SERVERS[target].judge(checkpoint, **options) if not found.what.startswith("this is a ")]


def fatal(target, checkpoint):
    return [str(found) for found in judged(target, checkpoint) if found.is_fatal]


def remarks(target, checkpoint):
    return [str(found) for found in judged(target, checkpoint) if not found.is_fatal]


@pytest.mark.parametrize("target", SERVERS)
def test_a_server_says_which_release_its_rules_are_of(target):
    server = SERVERS[target]
    assert server.name == target
    assert any(letter.isdigit() for letter in server.version)
    assert server.version.split(".")[0].split()[-1] in (type(server).__doc__ or "")


def test_every_server_loads_what_a_writer_writes():
    written = {*Registry().writers, "kohya", "diffusers"}  # the last two are of the diffusion plugin
    assert all(server.format in written and server.format in server.reads for server in SERVERS.values())


def test_only_vllm_is_started_with_a_rank_of_a_list():
    assert {target: accepted_ranks(target) for target in SERVERS if accepted_ranks(target)} == {"vllm": VLLM_RANKS}


@pytest.mark.parametrize("target", SERVERS)
def test_what_a_merge_writes_is_applied_everywhere_once_it_is_in_the_servers_format(target):
    assert SERVERS[target].judge(at_home(target), dialect=SERVERS[target].format) == []


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_what_a_merge_writes_is_loaded_as_it_lies(target):
    assert SERVERS[target].judge(opened()) == []


@pytest.mark.parametrize(
    ("target", "format_name"), [("llama.cpp", "gguf"), ("diffusers", "diffusers"), ("comfyui", "kohya")]
)
def test_another_dialect_is_to_be_converted(target, format_name):
    (found,) = SERVERS[target].judge(at_home(target))
    assert found.is_fatal
    assert found.what.startswith("this is a PEFT directory; ")
    assert found.advice.startswith(f"Convert it: mergekit-lowrank convert ADAPTER OUT --format {format_name}")
    assert ("--base DIRECTORY" in found.advice) == (target == "llama.cpp")


@pytest.mark.parametrize("kind", ["lora_bias", "bias", "modules_to_save", "embedding", "norm", "rows"])
def test_what_the_writer_refuses_is_not_to_be_converted(kind):
    extra, settings = BESIDE[kind]
    found = SERVERS["llama.cpp"].judge(opened({**linear(*ATTENTION), **extra}, use_rslora=True, **settings))
    assert len(found) == 3  # what is beside the factors, rsLoRA, and the dialect
    assert not any("convert" in verdict.advice for verdict in found)


@pytest.mark.parametrize("target", DIFFUSION)
def test_an_adapter_of_a_language_model_is_nothing_for_a_pipeline(target):
    (found,) = SERVERS[target].judge(opened())
    assert found.is_fatal
    assert f"{target} loads LoRAs of diffusion models; this is of a language model: '{Q}'" in found.what
    assert found.advice.startswith("Serve it by vllm, sglang or llama.cpp.")
    assert SERVERS[target].judge(opened(), dialect=SERVERS[target].format) == [found]


@pytest.mark.parametrize(
    "module",
    [
        "unet.conv_in",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "transformer.blocks.0.attn1.to_q",
        "transformer.blocks.0.ffn.net.0.proj",
        "mid_block.attentions.0.proj_in",
        "single_transformer_blocks.0.attn.to_q",
    ],
)
@pytest.mark.parametrize("target", SERVERS)
def test_a_module_of_a_pipeline_shows_by_its_name(target, module):
    (found,) = SERVERS[target].judge(opened(linear(module)))
    assert ("this is a LoRA of a diffusion model" in found.what) == (target in TEXT)


@pytest.mark.parametrize(
    "module", ["transformer.h.0.attn.c_attn", "transformer.blocks.0.norm_attn_norm.attn.Wqkv", "encoder.layer.0.query"]
)
def test_a_language_model_may_be_called_a_transformer(module):
    assert SERVERS["vllm"].judge(opened(linear(module))) == []


def test_a_convolution_of_a_pipeline_is_not_to_be_folded_for_a_text_server():
    kernel = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 3, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    (found,) = SERVERS["vllm"].judge(opened(kernel))
    assert found.what == "vllm serves language models; this is a LoRA of a diffusion model: 'unet.conv_in'"
    assert found.advice == "Load it in diffusers or comfyui."


@pytest.mark.parametrize("target", SERVERS)
def test_a_whole_model_is_no_adapter(target, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (found,) = SERVERS[target].judge(WholeModelFormat().open(tmp_path, label="tuned"))
    assert found.is_fatal
    assert "whole model and no adapter" in found.what


@pytest.mark.parametrize("target", TEXT)
def test_dora_is_refused(target):
    magnitudes = {f"{module}.lora_magnitude_vector": torch.ones(8) for module in ATTENTION}
    dora = opened({**linear(*ATTENTION), **magnitudes}, use_dora=True)
    assert any("DoRA" in found for found in fatal(target, dora))


@pytest.mark.parametrize("target", TEXT)
def test_vera_is_no_dora_and_becomes_a_lora_with_the_base_at_hand(target):
    own = {
        f"{module}.vera_lambda_{side}": torch.ones(size) for module in ATTENTION for side, size in (("b", 8), ("d", 2))
    }
    tensors = {f"base_model.model.{key}": tensor for key, tensor in own.items()}
    shared = {"base_model.vera_A": torch.ones(2, 8), "base_model.vera_B": torch.ones(8, 2)}
    config = {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (found,) = SERVERS[target].judge(Adapter({**tensors, **shared}, config).open(label="vera"))
    assert found.is_fatal
    assert "DoRA" not in found.what
    assert found.advice == "Make it a plain LoRA first: mergekit-lowrank resize ADAPTER OUT --rank 2 --base BASE."


# Scaling and ranks


def test_rslora_is_misapplied_by_the_root_of_the_rank_where_it_is_not_read():
    rslora = opened(linear(*ATTENTION, rank=16), r=16, lora_alpha=8, use_rslora=True)
    assert judged("vllm", rslora) == []
    for target in ("sglang", "llama.cpp"):
        (found,) = fatal(target, rslora)
        assert "so 6 of 6 updates would be applied 0.25 times as strong" in found  # (8 / 16) / (8 / 4)


def test_an_alpha_of_its_own_is_misapplied_where_patterns_are_not_read():
    patterns = opened(alpha_pattern={f"^{Q}": 4, "v_proj": 1})
    for target in ("sglang", "llama.cpp"):
        (found,) = fatal(target, patterns)
        assert "so 3 of 6 updates would be applied 0.5 to 2 times as strong" in found
        assert Q in found
    (remark,) = judged("vllm", patterns)
    assert not remark.is_fatal
    assert "vLLM 0.33.0 reads rank_pattern and alpha_pattern; older releases" in remark.what


def test_llama_cpp_divides_by_the_rank_of_each_tensor():
    mixed = opened({**linear(*ATTENTION[1:]), **linear(Q, rank=4)}, rank_pattern={Q: 4}, alpha_pattern={Q: 4})
    (found,) = fatal("llama.cpp", mixed)
    assert f"so 1 of 6 updates would be applied 0.5 times as strong: '{Q}'" in found


def test_an_alpha_of_zero_is_scaling_one_in_llama_cpp():
    (found,) = fatal("llama.cpp", opened(lora_alpha=0))
    assert "applied inf times as strong" in found


def test_the_gguf_writer_makes_none_of_these_mistakes():
    rslora = opened(use_rslora=True, alpha_pattern={Q: 9})
    assert SERVERS["llama.cpp"].judge(rslora, dialect="gguf") == []


def test_sglang_fails_at_another_rank_than_r():
    mixed = opened({**linear(*ATTENTION[1:]), **linear(Q, rank=4)}, rank_pattern={Q: 4}, alpha_pattern={Q: 4})
    assert any(
        f"takes r (2) for the rank of every module and fails at others: '{Q}'" in f for f in fatal("sglang", mixed)
    )
    assert fatal("vllm", mixed) == []


@pytest.mark.parametrize(("rank", "started"), [(1, None), (16, None), (17, 32), (300, 320), (512, 512)])
def test_vllm_is_started_with_the_next_of_its_ranks(rank, started):
    found = judged("vllm", opened(linear(*ATTENTION, rank=rank, shape=(600, 600)), r=rank, lora_alpha=rank))
    assert [verdict.advice for verdict in found] == ([f"Start it with --max-lora-rank {started}."] if started else [])
    assert not any(verdict.is_fatal for verdict in found)


def test_vllm_loads_no_rank_above_its_largest():
    (found,) = fatal("vllm", opened(linear(*ATTENTION, rank=513, shape=(600, 600)), r=513, lora_alpha=513))
    assert "no rank above 512; the largest is 513" in found
    assert "resize ADAPTER OUT --rank 512" in found


# Modules


@pytest.mark.parametrize("target", TEXT)
def test_convolutions_are_refused(target):
    kernel = {"conv.lora_A.weight": torch.ones(2, 3, 3, 3), "conv.lora_B.weight": torch.ones(4, 2, 1, 1)}
    assert any("convolutions: 'conv'" in found for found in fatal(target, opened({**linear(*ATTENTION), **kernel})))


@pytest.mark.parametrize("target", DIFFUSION)
def test_convolutions_are_at_home_in_diffusion(target):
    kernel = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 3, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    assert SERVERS[target].judge(opened(kernel), dialect="kohya") == []


EMBEDDING = {
    "model.embed_tokens.lora_embedding_A": torch.ones(2, 16),
    "model.embed_tokens.lora_embedding_B": torch.ones(8, 2),
}


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_factors_of_embeddings_load_under_a_condition(target):
    embedding = opened({**linear(*ATTENTION), **EMBEDDING})
    assert fatal(target, embedding) == []
    (remark,) = remarks(target, embedding)
    assert "load only where" in remark


@pytest.mark.parametrize(
    ("targets", "is_dropped"), [(["q_proj"], True), (["q_proj", "model.embed_tokens"], False), ("all-linear", False)]
)
def test_sglang_loads_embeddings_that_target_modules_names(targets, is_dropped):
    found = fatal("sglang", opened({**linear(*ATTENTION), **EMBEDDING}, target_modules=targets))
    assert [("target_modules does not name: 'model.embed_tokens'" in text) for text in found] == [True] * is_dropped


def test_sglang_reads_no_expression_as_target_modules():
    (found,) = fatal("sglang", opened(target_modules=".*_proj"))
    assert "reads no target_modules like '.*_proj'" in found


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ("qv", None),
        ("qkv", None),
        ("q", "fails at q_proj without v_proj: 'model.layers.0.self_attn.q_proj'"),
        ("v", "without q_proj, and up_proj without gate_proj, with a warning only: 'model.layers.0.self_attn.v_proj'"),
        ("k", "with a warning only: 'model.layers.0.self_attn.k_proj'"),
    ],
)
def test_sglang_fuses_projections_from_q_on(present, message):
    modules = [f"model.layers.0.self_attn.{side}_proj" for side in present]
    found = fatal("sglang", opened(linear(*modules)))
    assert len(found) == bool(message)
    assert not message or message in found[0]


@pytest.mark.parametrize(
    ("names", "is_dropped"), [(("gate_proj",), False), (("gate_proj", "up_proj"), False), (("up_proj",), True)]
)
def test_sglang_fuses_gate_and_up_from_gate_on(names, is_dropped):
    found = fatal("sglang", opened(linear(*(f"model.layers.0.mlp.{name}" for name in names))))
    assert ["'model.layers.0.mlp.up_proj'" in text for text in found] == [True] * is_dropped


def test_sglang_looks_into_layers_only():
    (found,) = fatal("sglang", opened(linear(*ATTENTION, "model.projector.linear")))
    assert "outside of the layers without a word: 'model.projector.linear'" in found


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module.", "model._fsdp_wrapped_module."])
def test_vllm_serves_the_base_where_names_fit_no_module(prefix):
    (found,) = fatal("vllm", opened(linear(f"{prefix}{Q}")))
    assert "vLLM serves the base without an error" in found


# What lies beside the factors

BESIDE = {
    "lora_bias": ({f"{Q}.lora_B.bias": torch.ones(8)}, {"lora_bias": True}),
    "bias": ({f"{Q}.base_layer.bias": torch.ones(8)}, {"bias": "lora_only"}),
    "modules_to_save": ({"lm_head.weight": torch.ones(16, 8)}, {"modules_to_save": ["lm_head"]}),
    "embedding": ({"model.embed_tokens.base_layer.weight": torch.ones(16, 8)}, {}),
    "norm": ({"model.norm.weight": torch.ones(8)}, {}),
    "rows": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 8)},
        {"trainable_token_indices": {"model.embed_tokens": [3]}},
    ),
}
SAID = {
    ("vllm", "lora_bias"): f"refuses lora_bias: '{Q}.bias'",
    ("vllm", "bias"): "refuses trained biases",
    ("vllm", "modules_to_save"): "refuses modules_to_save other than classifier and score: 'lm_head.weight'",
    ("vllm", "norm"): "refuses whole tensors: 'model.norm.weight'",
    ("vllm", "rows"): "refuses trainable_token_indices: 'model.embed_tokens.weight'",
    ("sglang", "lora_bias"): "takes them for factors",
    ("sglang", "bias"): "takes them for factors",
    ("sglang", "modules_to_save"): "leaves out whole tensors (modules_to_save): 'lm_head.weight'",
    ("sglang", "rows"): "leaves out trainable_token_indices",
    ("llama.cpp", "lora_bias"): "has no lora_bias",
    ("llama.cpp", "modules_to_save"): "loads no whole tensors",
    ("llama.cpp", "norm"): "loads no whole tensors",
    ("llama.cpp", "rows"): "has no trainable_token_indices",
    ("diffusers", "modules_to_save"): "loads no whole tensors",
    ("comfyui", "modules_to_save"): "leaves whole tensors of PEFT out",
}


@pytest.mark.parametrize(("target", "kind"), SAID)
def test_what_lies_beside_the_factors_is_named(target, kind):
    extra, settings = BESIDE[kind]
    (found,) = fatal(target, at_home(target, extra, **settings))
    assert SAID[target, kind] in found
    assert "kind: model" in found


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_weights_of_the_base_beside_their_factors_matter_only_with_added_tokens(target):
    extra, _ = BESIDE["embedding"]
    copied = opened({**linear(*ATTENTION), **extra})
    assert fatal(target, copied) == []
    (remark,) = remarks(target, copied)
    assert "beside their factors: 'model.embed_tokens.weight'. That is right unless tokens were added" in remark


def test_weights_of_the_base_beside_their_factors_are_not_written_as_gguf():
    extra, _ = BESIDE["embedding"]
    (found,) = fatal("llama.cpp", opened({**linear(*ATTENTION), **extra}))
    assert "ours refuses them: 'model.embed_tokens.weight'" in found
    assert "save_pretrained(…, save_embedding_layers=False)" in found


def test_vllm_loads_the_head_of_a_classifier():
    head = opened({**linear(*ATTENTION), "score.weight": torch.ones(2, 8)}, modules_to_save=["score"])
    assert judged("vllm", head) == []


def test_a_thousand_of_a_kind_make_one_verdict():
    biases = {f"{module}.lora_B.bias": torch.ones(8) for module in ATTENTION}
    (found,) = fatal("vllm", opened({**linear(*ATTENTION), **biases}, lora_bias=True))
    assert "and 3 more" in found


# Files


def test_vllm_opens_a_directory_itself(tmp_path):
    write_tiny_adapter(tmp_path / "math" / "named", dict.fromkeys(ATTENTION, (8, 8)))
    (found,) = fatal("vllm", PeftFormat().open(tmp_path / "math", label="math"))
    assert "this one lies below it" in found


def test_vllm_opens_no_shards(tmp_path):
    directory = write_tiny_adapter(tmp_path / "math", dict.fromkeys(ATTENTION, (8, 8)))
    (directory / "adapter_model.safetensors").rename(directory / "part.safetensors")
    keys = [f"base_model.model.{module}.lora_{side}.weight" for module in ATTENTION for side in "AB"]
    index = {"weight_map": dict.fromkeys(keys, "part.safetensors")}
    (directory / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (found,) = fatal("vllm", PeftFormat().open(directory, label="math"))
    assert "no shards: 'adapter_model.safetensors.index.json'" in found


class InOneFile(Checkpoint):
    """An adapter as the diffusion plugin opens it: one file, and scaling from wherever the dialect has it."""

    def __init__(self, path, scaling, key):
        save_file({key: torch.ones(2, 2)}, path)
        adapter = opened(linear("unet.to_q"), lora_alpha=2 * scaling)
        self.label, self.location, self.files, self.base_model = "style", str(path), (path,), None
        self.modules, self.config = adapter.modules, {}

    def read(self, module):
        return LowRankUpdate(torch.ones(2, 2), torch.ones(2, 2), 1.0)


def test_comfyui_reads_alpha_from_tensors_only(tmp_path):
    silent = InOneFile(tmp_path / "a.safetensors", 0.5, "unet.to_q.lora_A.weight")
    (found,) = fatal("comfyui", silent)
    assert "does not read alpha from the file's header, so 1 of 1 updates would be applied 2 times as strong" in found
    assert fatal("diffusers", silent) == []
    assert SERVERS["comfyui"].judge(InOneFile(tmp_path / "b.safetensors", 0.5, "lora_unet_to_q.alpha")) == []
    assert SERVERS["comfyui"].judge(InOneFile(tmp_path / "c.safetensors", 1, "unet.to_q.lora_A.weight")) == []


def test_a_diffusion_file_is_nothing_for_a_text_server(tmp_path):
    style = InOneFile(tmp_path / "a.safetensors", 1, "lora_unet_to_q.alpha")
    for target in TEXT:
        (found,) = SERVERS[target].judge(style)
        assert found.what.endswith("this is a LoRA of a diffusion model: 'unet.to_q'")


def test_remedies_name_the_adapter(tmp_path):
    directory = write_tiny_adapter(tmp_path / "my math", dict.fromkeys(ATTENTION, (8, 8)), use_rslora=True)
    checkpoint = PeftFormat().open(directory, label="math")
    (found,) = fatal("sglang", checkpoint)
    assert f"merge --method linear '{directory}' -o 'my math-served/'" in found
    (found,) = SERVERS["sglang"].judge(checkpoint, called="org/math")
    assert "merge --method linear org/math -o math-served/" in found.advice
