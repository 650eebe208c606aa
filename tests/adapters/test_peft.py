"""Adapters against PEFT itself: both directions, equal logits; what is not built is refused by key and value."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.adapters import LoraConfig, adapted, adapter_of, attach, merge, peft_format
from minillm.model.weights import load as load_model
from minillm.model.weights import save

SHAPE = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"head_dim": 8}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen2, biases": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
}
CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16},
    "one name": {"target_modules": ["model.layers.1.mlp.down_proj"], "layers_to_transform": [0]},
    "regex": {"target_modules": r".*layers\.[02]\..*(gate|up)_proj", "r": 3},
    "rank-stabilized": {"target_modules": ["o_proj", "k_proj"], "use_rslora": True, "r": 6, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
        "r": 5,
        "rank_pattern": {
            "down_proj": 2,
            "k_proj": 1,
            r"layers\.1\.self_attn\.(q|k)_proj": 7,
        },
        "alpha_pattern": {r"model.layers.0.self_attn.q_proj": 3, "q_proj": 21},
    },
    "patterns, rank-stabilized": {
        "target_modules": ["v_proj", "gate_proj"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"v_proj": 2},
        "use_rslora": True,
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer, its list": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "exclusions": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "excluded by regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    "the head": {"target_modules": ["lm_head", "v_proj"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict:
    """kind -> (transformers' class, its folder)"""
    found = {}
    for kind, (config, model, more) in KINDS.items():
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("base")
        made = model(config(**SHAPE, **more))
        for parameter in made.parameters():
            parameter.data.normal_(std=0.2)
        made.save_pretrained(folder)
        found[kind] = model, folder
    return found


def theirs(bases, kind: str, config: dict) -> peft.PeftModel:
    """A PEFT model whose adapter is not nothing."""
    model, folder = bases[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model.from_pretrained(folder), peft.LoraConfig(**config)).eval()
    torch.manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return made


IDS = torch.arange(22).view(2, 11) * 3 % 70


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS)) if hasattr(model, "logits") else model(IDS).logits.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_peft_writes_is_read(bases, tmp_path, kind, config):
    made = theirs(bases, kind, CONFIGS[config])
    made.save_pretrained(tmp_path)
    model = load_model(bases[kind][1], "cpu")
    before = logits(model)
    adapter = peft_format.load(tmp_path, model)
    attach(model, adapter)
    expected = logits(made)
    assert (expected - before).abs().max() > 0.002
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    if config != "the head":  # which the embedding would change with
        merge(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_reads_what_is_written(bases, tmp_path, kind, config):
    """Every tensor, and the same targets from the config alone."""
    model = load_model(bases[kind][1], "cpu")
    words = {k: tuple(v) if isinstance(v, list) else v for k, v in CONFIGS[config].items()}
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(words.get(key), int | str):
            words[key] = (words[key],)
    ours = LoraConfig(**words)
    adapted(model, ours)
    torch.manual_seed(6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    peft_format.save(adapter_of(model, ours), tmp_path / "adapter")
    base = bases[kind][0].from_pretrained(bases[kind][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing keys are one
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        made = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    taken = {name for name, _ in made.named_parameters() if "lora_" in name}
    assert len(taken) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(made), logits(model), atol=1e-4, rtol=1e-4)


def test_round_trip_is_exact(bases, tmp_path):
    made = theirs(bases, "llama", CONFIGS["patterns"])
    made.save_pretrained(tmp_path / "theirs")
    adapter = peft_format.load(tmp_path / "theirs")
    peft_format.save(adapter, tmp_path / "ours")
    again = peft_format.load(tmp_path / "ours")
    assert again.digest == adapter.digest
    assert again.config == adapter.config
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---- refused, by name ------------------------------------------------------------------------------------------------

MADE = {  # by PEFT itself
    "use_dora": (peft.LoraConfig, {"use_dora": True}),
    "bias": (peft.LoraConfig, {"bias": "lora_only"}),
    "lora_bias": (peft.LoraConfig, {"lora_bias": True}),
    "modules_to_save": (peft.LoraConfig, {"modules_to_save": ["norm"]}),
    "trainable_token_indices": (peft.LoraConfig, {"trainable_token_indices": [3, 4]}),
    "init_lora_weights": (peft.LoraConfig, {"init_lora_weights": "pissa"}),
    "layer_replication": (peft.LoraConfig, {"layer_replication": [(0, 2), (1, 3)]}),
    "alora_invocation_tokens": (peft.LoraConfig, {"alora_invocation_tokens": [5]}),
    "peft_type": (peft.IA3Config, {"feedforward_modules": ["v_proj"]}),
    "peft_type, LoHa": (peft.LoHaConfig, {}),
    "peft_type, LoKr": (peft.LoKrConfig, {}),
    "peft_type, VeRA": (peft.VeraConfig, {"target_modules": ["q_proj", "o_proj"]}),
    "peft_type, AdaLoRA": (peft.AdaLoraConfig, {"total_step": 10}),
    "peft_type, OFT": (peft.OFTConfig, {"oft_block_size": 8}),
    "peft_type, prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize("case", MADE)
def test_what_is_not_built_is_refused_by_key_and_value(bases, tmp_path, case):
    kind, more = MADE[case]
    base = bases["llama"][0].from_pretrained(bases["llama"][1])
    options = {} if kind is peft.PromptTuningConfig else {"target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, kind(**(options | more)))
        made.save_pretrained(tmp_path)
    key = case.split(",")[0]
    value = json.loads((tmp_path / "adapter_config.json").read_text())[key]
    with pytest.raises(ValueError, match=rf"adapter_config.json: {key}(: expected 'LORA', got| =)") as said:
        peft_format.load(tmp_path, load_model(bases["llama"][1], "cpu"))
    assert str(value).strip("[]") in str(said.value) or json.dumps(value) in str(said.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("target_parameters", ["experts.w"]),
        ("fan_in_fan_out", True),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"x": 1}),
        ("velora_config", {"x": 1}),
        ("monteclora_config", {"x": 1}),
        ("use_bdlora", {"n": 2}),
        ("megatron_config", {"x": 1}),
        ("of_a_release_to_come", 0.5),
        ("corda_config", {"x": 1}),
        ("lora_ga_config", {"x": 1}),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "pissa_niter_4"),
        ("bias", "all"),
    ],
)
def test_keys_that_mean_something_else_are_refused(bases, tmp_path, key, value):
    theirs(bases, "llama", CONFIGS["plain"]).save_pretrained(tmp_path)
    edit(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"{key} = .*not supported"):
        peft_format.load(tmp_path)
    for harmless in (None, False, [], {}, ""):
        if key not in ("bias", "init_lora_weights"):
            edit(tmp_path, **{key: harmless})
            peft_format.load(tmp_path)


def edit(folder, **more) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def change(folder, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


NAME = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG = {
    "half": (lambda t: t.pop(f"{NAME}.lora_B.weight"), "q_proj.lora_A.weight has no lora_B"),
    "the other half": (lambda t: t.pop(f"{NAME}.lora_A.weight"), "q_proj.lora_B.weight has no lora_A"),
    "both": (lambda t: [t.pop(f"{NAME}.lora_{x}.weight") for x in "AB"], "0.self_attn.q_proj: .*has no tensors for it"),
    "foreign": (lambda t: t.update(stranger=torch.zeros(2)), "stranger: expected names such as"),
    "magnitude": (
        lambda t: t.update({f"{NAME}.lora_magnitude_vector": torch.ones(32)}),
        "magnitude_vector: expected names",
    ),
    "not named": (
        lambda t: t.update(
            {
                f"{NAME[:-6]}k_proj.lora_A.weight": torch.zeros(8, 32),
                f"{NAME[:-6]}k_proj.lora_B.weight": torch.zeros(16, 8),
            }
        ),
        "k_proj: .*does not name it",
    ),
    "rank": (
        lambda t: t.update({f"{NAME}.lora_A.weight": torch.zeros(4, 32), f"{NAME}.lora_B.weight": torch.zeros(32, 4)}),
        r"lora_A \[8, in\]",
    ),
    "columns": (
        lambda t: t.update({f"{NAME}.lora_A.weight": torch.zeros(8, 31)}),
        r"q_proj.lora_A: expected shape \[8, 32\]",
    ),
    "rows": (
        lambda t: t.update({f"{NAME}.lora_B.weight": torch.zeros(33, 8)}),
        r"q_proj.lora_B: expected shape \[32, 8\]",
    ),
    "NaN": (lambda t: t[f"{NAME}.lora_A.weight"].fill_(float("nan")), "expected finite numbers"),
    "integers": (lambda t: t.update({f"{NAME}.lora_A.weight": torch.zeros(8, 32).int()}), "holds int32"),
    "no such layer": (
        lambda t: t.update({k.replace("layers.0", "layers.7"): v.clone() for k, v in t.items() if "layers.0" in k}),
        "model.layers.7.*no such matrix",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_named(bases, tmp_path, case):
    theirs(bases, "llama", CONFIGS["plain"]).save_pretrained(tmp_path)
    wrong, says = WRONG[case]
    change(tmp_path, wrong)
    with pytest.raises(ValueError, match=says):
        peft_format.load(tmp_path, load_model(bases["llama"][1], "cpu"))


def test_folders_without_an_adapter_are_named(bases, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        peft_format.load(tmp_path)
    made = theirs(bases, "llama", CONFIGS["plain"])
    made.save_pretrained(tmp_path)
    tensors = tmp_path / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="corrupt or cut off"):
        peft_format.load(tmp_path)
    tensors.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"a pickle"):
        peft_format.load(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        peft_format.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        peft_format.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        peft_format.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("r", 0, "r: expected a rank"),
        ("r", "8", "r: expected a rank"),
        ("lora_alpha", "x", "lora_alpha: expected a number"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern.*q_proj.*expected a rank"),
        ("rank_pattern", [1], "rank_pattern: expected"),
        ("target_modules", None, "target_modules: expected names"),
        ("target_modules", [3], "target_modules: expected a text"),
        ("target_modules", "(", "target_modules: expected a regular expression"),
        ("layers_to_transform", ["a"], "layers_to_transform"),
        ("alpha_pattern", {"(": 3}, "alpha_pattern: expected a regular expression"),
    ],
)
def test_values_that_make_no_sense_are_named(bases, tmp_path, key, value, says):
    theirs(bases, "llama", CONFIGS["plain"]).save_pretrained(tmp_path)
    edit(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=says):
        peft_format.load(tmp_path)


def test_a_failed_write_leaves_nothing(bases, tmp_path, monkeypatch):
    model = load_model(bases["llama"][1], "cpu")
    adapted(model, LoraConfig())
    monkeypatch.setattr(peft_format, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        peft_format.save(adapter_of(model), tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_a_model_with_an_adapter_is_saved_as_its_base(bases, tmp_path):
    model = load_model(bases["qwen3"][1], "cpu")
    expected = logits(model)
    adapted(model, LoraConfig(target_modules=("q_proj",)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    save(model, tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again", "cpu")), expected)
