"""Options of the method: what they become, and that every wrong one is refused in one sentence."""

import copy
import json
import pickle
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tree_tools import sets_of_one
from vllm.config.cache import CacheDType
from vllm.config.utils import replace
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from bita_vllm import config as bita_config
from bita_vllm import plugin, refusals
from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
from bita_vllm.adapter.config import ModelShape
from bita_vllm.adapter.deltas import MaskLoraWeights
from bita_vllm.config import check_engine
from bita_vllm.scheduling import default_rows, row_options
from bita_vllm.step.settings import get_settings
from bita_vllm.system import platform
from bita_vllm.system.machine import cpu_name
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import LADDER_FILE, Ladder

plugin.register()


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """An untrained adapter for the tiny Llama: k = 3, row budget 20."""
    folder = tmp_path_factory.mktemp("adapter")
    base = tiny_model("llama")
    text_config = json.loads((base / "config.json").read_text())
    shape = ModelShape.from_hf_config(text_config)
    save_adapter(
        folder,
        random_adapter(
            shape,
            3,
            4,
            0,
            verifier=str(base),
            transformer_layer_config=text_config,
            speculative_tokens=20,
        ),
    )
    return folder


@pytest.fixture
def make(tiny_model, adapter):
    """Build the engine config of a bita run: options of the method, then engine arguments."""

    def factory(options=None, **engine):
        speculative = {"method": "bita", "model": str(adapter), **(options or {})}
        engine = {"model": str(tiny_model("llama")), "max_model_len": 256, **engine}
        return EngineArgs(**engine, speculative_config=speculative).create_engine_config()

    return factory


def refused(build) -> str:
    """The one sentence `build` is refused with."""
    with pytest.raises(ValueError) as error:
        build()
    message = str(error.value)
    assert "\n" not in message
    assert "validation error" not in message
    return message


def test_default_rows_follow_the_load(make, monkeypatch):
    """Of whatever machine this is: never the same block at every load, plain beyond some load."""
    for on_gpu in (False, True):
        monkeypatch.setattr(platform, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        settings = get_settings(make())
        assert settings.tree == "auto"
        assert settings.num_speculative_tokens == settings.template.width
        assert settings.template.max_depth >= 1
        assert settings.num_mask_tokens == 3
        widths = settings.ladder.lookup(512)[1:]
        assert widths[-1] == 0
        assert (np.diff(widths) <= 0).all()


def test_default_rows_of_a_gpu_are_in_vllms_own_table(make, monkeypatch):
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    spec = make().speculative_config
    table = spec.num_speculative_tokens_per_batch_size
    assert table == list(spec.bita.ladder.batch_sizes)
    assert len(table) > 1 and table[-1][2] == 0
    assert max(width for *_, width in table) == spec.num_speculative_tokens


def test_where_no_default_block_fits_blocks_have_the_adapters_row_budget(make, monkeypatch):
    monkeypatch.setattr(bita_config, "default_ladder", lambda *args: None)
    settings = get_settings(make())
    assert settings.ladder.is_fixed
    assert settings.num_speculative_tokens == settings.template.num_rows - 1 <= 20


@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU", "GPU"])
@pytest.mark.parametrize("options", [{"num_speculative_tokens": 11}, {"tree": "2,1"}], ids=str)
def test_what_the_user_asks_for_is_one_block_at_every_load(make, monkeypatch, options, on_gpu):
    monkeypatch.setattr(platform, "on_gpu", lambda: on_gpu)
    spec = make(options).speculative_config
    assert spec.bita.ladder.is_fixed
    assert spec.num_speculative_tokens_per_batch_size is None
    assert set(spec.bita.ladder.lookup(512)[1:]) == {spec.num_speculative_tokens}


def test_the_log_says_what_the_rule_chose(make, monkeypatch):
    said = []
    monkeypatch.setattr(default_rows.logger, "info", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    ladder = get_settings(make()).ladder
    assert said[0].startswith("bita: no ladder for this machine; rows by load")
    assert ladder.describe() in said[0] and "'bita tune' measures it" in said[0]
    make({"tree": "2,1"})
    assert len(said) == 1


def test_row_budget_bounds_the_automatic_tree(make):
    settings = get_settings(make({"num_speculative_tokens": 11}))
    assert settings.num_speculative_tokens <= 11


@pytest.mark.parametrize("tree", ["2,1", " 2, 1", "5,4,3", "4"])
def test_widths_set_the_rows(make, tree):
    settings = get_settings(make({"tree": tree}))
    expected = Template.from_widths([int(width) for width in tree.split(",")], 3)
    assert (settings.template.parent == expected.parent).all()
    assert settings.num_speculative_tokens == expected.width


def test_one_width_may_arrive_as_a_number(make):
    assert get_settings(make({"tree": 4})).template.max_depth == 1


def test_template_file_sets_the_rows(make, tmp_path):
    template = Template.build([(0, 0), (0, 1), (1, 0)], {0: 3, 1: 1})
    template.save(tmp_path / "tree.json")
    settings = get_settings(make({"tree": str(tmp_path / "tree.json")}))
    assert (settings.template.parent == template.parent).all()


@pytest.fixture
def ladder(tmp_path):
    """The file of a ladder: 16 rows for one request, 4 for two, then plain."""
    templates = Template.from_widths([2, 1], 3), Template.from_widths([1], 1)
    Ladder(sets_of_one(templates), [(1, 1, 15), (2, 2, 3), (3, 3, 0)]).save(
        tmp_path / "my_ladder.json"
    )
    return tmp_path / "my_ladder.json"


def test_ladder_file_sets_the_templates(make, ladder):
    settings = get_settings(make({"ladder": str(ladder)}))
    assert settings.ladder.lookup(4).tolist() == [0, 15, 3, 0, 0]
    assert [one.first.num_rows for one in settings.ladder.template_sets] == [4, 16]
    assert settings.num_speculative_tokens == 15
    assert (settings.template.num_rows, settings.template.max_depth) == (16, 2)


@pytest.mark.parametrize("options", [{}, {"num_speculative_tokens": "auto"}, {"tree": "auto"}])
def test_ladder_beside_the_adapter_is_the_default(make, adapter, ladder, tmp_path, options):
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    shutil.copy(ladder, copied / LADDER_FILE)
    settings = get_settings(make({"model": str(copied), **options}))
    assert settings.ladder.widths == [3, 15]
    fixed = get_settings(make({"model": str(copied), "num_speculative_tokens": 9}))
    assert len(fixed.ladder.template_sets) == 1
    assert fixed.num_speculative_tokens <= 9
    assert len(get_settings(make({"model": str(copied), "tree": "2,1"})).templates) == 1


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, True),
        ({"num_speculative_tokens": 7}, True),
        ({"copies": False}, False),
        ({"tree": "2,1"}, False),
        ({"tree": "2,1", "copies": True}, True),
    ],
)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU", "GPU"])
def test_blocks_copy_unless_the_user_has_other_wishes(make, monkeypatch, options, copies, on_gpu):
    """On a GPU they do if the user says so."""
    monkeypatch.setattr(platform, "on_gpu", lambda: on_gpu)
    copies &= not on_gpu or "copies" in options
    settings = get_settings(make(options))
    assert settings.source == ("masks and copies" if copies else "masks")
    for one in settings.ladder.template_sets:
        assert one.first.num_copies == 0
        assert any(template.num_copies for template in one.templates) == copies


def test_a_ladder_that_copies_is_not_for_a_run_that_does_not(make, tmp_path):
    copying = Template.build([(0, 0)], {0: 2, 1: 1}, copies=3)
    Ladder.fixed(copying).save(tmp_path / "ladder.json")
    options = {"ladder": str(tmp_path / "ladder.json")}
    assert [t.num_copies for t in get_settings(make(options)).templates] == [3]
    message = refused(lambda: make({**options, "copies": False}))
    assert message.startswith("The ladder or tree has nodes for copied tokens")


def test_copies_are_a_yes_or_a_no(make):
    message = refused(lambda: make({"copies": 7}))
    assert message.startswith("Speculative option 'copies' is 7; expected true or false")


@pytest.mark.parametrize(
    ("device", "says"), [("a large machine", "another machine"), (cpu_name(), "")]
)
def test_ladder_of_another_machine(make, adapter, tmp_path, monkeypatch, device, says):
    """Named, it is used; next to the adapter it is not. Both times the user hears of it."""
    warnings = []
    monkeypatch.setattr(row_options.logger, "warning", lambda *args: warnings.append(args[0]))
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    sets = sets_of_one([Template.from_widths([1], 1)])
    ladder = Ladder(sets, [(1, 1, 3), (2, 2, 0)], {"device": device})
    ladder.save(copied / LADDER_FILE)
    beside = get_settings(make({"model": str(copied)})).ladder
    named = get_settings(make({"ladder": str(copied / LADDER_FILE)})).ladder
    assert named.batch_sizes == ladder.batch_sizes
    assert (beside.batch_sizes == ladder.batch_sizes) is (not says)
    assert len(warnings) == (2 if says else 0)
    assert all(says in warning for warning in warnings)


def test_on_a_gpu_vllm_itself_follows_the_table(make, ladder, monkeypatch):
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    spec = make({"ladder": str(ladder)}).speculative_config
    assert spec.num_speculative_tokens_per_batch_size == Ladder.load(ladder).batch_sizes
    assert make({"tree": "2,1"}).speculative_config.num_speculative_tokens_per_batch_size is None


def test_ladder_for_more_masks_than_the_adapter_has_is_refused(make, tmp_path):
    template = Template.from_widths([1], 4)
    Ladder.fixed(template).save(tmp_path / "long.json")
    message = refused(lambda: make({"ladder": str(tmp_path / "long.json")}))
    assert "a mask group of 4 rows, but the adapter has 3 mask tokens" in message


def test_ladder_deeper_than_the_adapters_masks_predict_is_refused(make, tmp_path):
    template = Template.build([(row, 0) for row in range(5)], {0: 3})
    Ladder.fixed(template).save(tmp_path / "deep.json")
    message = refused(lambda: make({"ladder": str(tmp_path / "deep.json")}))
    assert "draft nodes at depth 5, but the adapter's 3 mask tokens predict no further" in message
    template.save(tmp_path / "tree.json")
    message = refused(lambda: make({"tree": str(tmp_path / "tree.json")}))
    assert "draft nodes at depth 5, but the adapter's 3 mask tokens predict no further" in message


def test_scheduler_counts_the_template_rows(make):
    config = make({"tree": "2,1", "num_speculative_tokens": 60})
    assert config.num_speculative_tokens == get_settings(config).num_speculative_tokens == 15


def test_run_gets_our_worker_and_synchronous_scheduling(make):
    config = make()
    assert config.parallel_config.worker_cls == bita_config.CPU_WORKER_CLS
    assert config.scheduler_config.scheduler_cls == bita_config.SCHEDULER_CLS
    assert config.scheduler_config.async_scheduling is False
    assert not config.use_v2_model_runner


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy, replace])
def test_settings_survive_every_copy_vllm_makes(make, copied):
    config = make({"tree": "2,1"})
    other = copied(config)
    other = pickle.loads(other) if isinstance(other, bytes) else other
    assert get_settings(other).tree == "2,1"
    assert (get_settings(other).template.parent == get_settings(config).template.parent).all()
    assert repr(other.speculative_config) == repr(config.speculative_config)
    assert other.compute_hash() == config.compute_hash()


def test_config_looks_like_bita_and_like_no_other_method(make, adapter):
    spec = make({"tree": "2,1"}).speculative_config
    assert repr(spec) == (
        f"SpeculativeConfig(method='bita', model='{adapter}', num_spec_tokens=15, tree='2,1')"
    )
    assert not spec.use_eagle() and not spec.uses_draft_model() and not spec.uses_draft_kv_cache()
    assert not spec.use_ngram() and not spec.uses_extract_hidden_states()
    assert spec.max_num_new_slots_for_drafting == 0


def test_compile_cache_does_not_mix_bita_with_plain(make, tiny_model):
    plain = EngineArgs(str(tiny_model("llama")), max_model_len=256).create_engine_config()
    assert get_settings(plain) is None
    assert make().compute_hash() != plain.compute_hash()


def test_compile_cache_does_not_mix_packed_layers_with_vllms(make):
    config = make()
    before = config.compute_hash()
    config.speculative_config.packs_linear_layers = True
    assert config.compute_hash() != before


def test_compile_cache_does_not_mix_versions(make, monkeypatch):
    config = make()
    before = config.compute_hash()
    monkeypatch.setattr("bita_vllm.step.settings.__version__", "0.0.1")
    assert config.compute_hash() != before


def test_compile_cache_does_not_mix_deltas_of_other_ranks_and_modules(make, adapter, tmp_path):
    """What is compiled follows from rank and modules, not from the values."""
    hashes = [make().compute_hash()]
    assert get_settings(make()).mask_lora is None
    modules = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
    for i, (rank, names) in enumerate([(2, modules), (3, modules), (2, modules[:1]), (2, modules)]):
        folder = shutil.copytree(adapter, tmp_path / str(i))
        deltas = {n: (torch.full((rank, 128), i + 1.0), torch.ones(128, rank)) for n in names}
        MaskLoraWeights(rank, 1.0, deltas).save(folder / "mask_lora", "base", 3)
        hashes.append(make({"model": str(folder)}).compute_hash())
    assert len(set(hashes)) == 4 and hashes[4] == hashes[1]


OPTIONS = {
    "unknown option": (
        {"treee": "5,4,3"},
        ["'treee'", "method, model, num_speculative_tokens, tree"],
    ),
    "draft parallelism": ({"draft_tensor_parallel_size": 1}, ["'draft_tensor_parallel_size'", "1"]),
    "synthetic acceptance": (
        {"rejection_sample_method": "synthetic"},
        ["'rejection_sample_method'", "'synthetic'"],
    ),
    "batch-size table": (
        {"num_speculative_tokens_per_batch_size": [[1, 4, 8]]},
        ["'num_speculative_tokens_per_batch_size'"],
    ),
    "draft quantization": ({"quantization": "fp8"}, ["'quantization'", "'fp8'"]),
    "empty name": ({"model": ""}, ["'model' is ''", "adapter's directory"]),
    "adapter of another type": ({"model": 7}, ["'model' is 7", "adapter's directory"]),
    "adapter not there": ({"model": "/no/such/adapter"}, ["/no/such/adapter", "does not exist"]),
    "ladder that is not there": ({"ladder": "no.json"}, ["'no.json'", "'bita tune'"]),
    "ladder and tree": ({"ladder": "x.json", "tree": "2,1"}, ["'x.json'", "leave the ladder out"]),
    "ladder and budget": (
        {"ladder": "x.json", "num_speculative_tokens": 9},
        ["'x.json'", "num_speculative_tokens or tree is given too"],
    ),
    "budget zero": ({"num_speculative_tokens": 0}, ["num_speculative_tokens is 0", "2 to 255"]),
    "budget too large": ({"num_speculative_tokens": 256}, ["is 256", "2 to 255"]),
    "budget as text": ({"num_speculative_tokens": "9"}, ["'9'", "whole number"]),
    "budget below the tree": (
        {"tree": "5,4,3", "num_speculative_tokens": 20},
        ["is 20", "'5,4,3' needs 51"],
    ),
    "tree of another type": ({"tree": [5, 4, 3]}, ["[5, 4, 3]", "'5,4,3'"]),
    "tree without meaning": ({"tree": "5;4"}, ["'5;4'", "'auto'"]),
    "tree deeper than masks": ({"tree": "2,1,1,1"}, ["4 depths", "3 mask tokens"]),
    "tree with a zero": ({"tree": "2,0"}, ["[2, 0]", "at least one"]),
}


@pytest.mark.parametrize(("options", "facts"), OPTIONS.values(), ids=OPTIONS.keys())
def test_wrong_option_is_refused_in_one_sentence(make, options, facts):
    message = refused(lambda: make(options))
    assert all(fact in message for fact in facts), message


@pytest.mark.parametrize(
    ("statistics", "fact"),
    [({}, "got 0 lists"), ({"rank_probability": [[0.5, 0.6]] * 3}, "summing to at most 1")],
    ids=["empty", "not probabilities"],
)
def test_malformed_acceptance_statistics_are_refused(make, adapter, tmp_path, statistics, fact):
    def change(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, "acceptance": statistics}))

    folder = damaged(adapter, tmp_path, change)
    assert fact in refused(lambda: make({"model": str(folder)}))


def test_default_values_of_vllms_options_are_not_in_the_way(make):
    assert get_settings(make({"rejection_sample_method": "standard", "quantization": None}))


def test_template_file_that_is_broken_is_refused(make, tmp_path):
    (tmp_path / "tree.json").write_text("{")
    assert "tree.json" in refused(lambda: make({"tree": str(tmp_path / "tree.json")}))


def test_template_with_longer_groups_than_the_adapter_has_masks_is_refused(make, tmp_path):
    Template.build([(0, 0)], {0: 4}).save(tmp_path / "tree.json")
    message = refused(lambda: make({"tree": str(tmp_path / "tree.json")}))
    assert "4 rows" in message and "3 mask tokens" in message


def test_tensor_parallelism_is_served(make):
    assert get_settings(make(tensor_parallel_size=2)).num_mask_tokens == 3


def damaged(adapter, tmp_path, change):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    change(folder)
    return folder


def _truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["mask_embeddings"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _other_type(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "speculators_model_type": "eagle3"}))


DAMAGE = {
    "truncated": (_truncate, ["truncated"]),
    "NaN": (_poison, ["mask_embeddings", "NaN"]),
    "pickle": (_pickle_only, ["pickle", "pytorch_model.bin"]),
    "another method": (_other_type, ["'eagle3'", "bita"]),
}


@pytest.mark.parametrize(("change", "facts"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_adapter_is_refused_before_any_process_starts(
    make, adapter, tmp_path, change, facts
):
    folder = damaged(adapter, tmp_path, change)
    message = refused(lambda: make({"model": str(folder)}))
    assert all(fact in message for fact in facts), message


MISFITS = {
    "layers": ({"num_hidden_layers": 4}, ["num_layers", "3", "4"]),
    "KV heads": ({"num_key_value_heads": 4}, ["num_kv_heads", "2", "4"]),
    "vocabulary": ({"vocab_size": 640}, ["vocab_size", "512", "640"]),
}


@pytest.mark.parametrize(("overrides", "facts"), MISFITS.values(), ids=MISFITS.keys())
def test_adapter_for_another_model_is_refused_with_both_numbers(make, tiny_model, overrides, facts):
    message = refused(lambda: make(model=str(tiny_model("llama", **overrides))))
    assert all(fact in message for fact in facts), message


def verify(make, **params):
    config = make({"tree": "2,1"}, skip_tokenizer_init=True)
    SamplingParams(**params).verify(
        config.model_config, config.speculative_config, config.structured_outputs_config, None
    )


@pytest.mark.parametrize(
    "params",
    [
        {"min_p": 0.1}, {"logit_bias": {5: 1.0}}, {"min_tokens": 3}, {"allowed_token_ids": [3, 4]},
        {"seed": 1, "top_k": 4, "top_p": 0.9}, {"repetition_penalty": 1.2, "logprobs": 3, "n": 2},
        {"thinking_token_budget": 4},
    ],
    ids=lambda params: "-".join(params),
)  # fmt: skip
def test_request_that_bita_serves_is_let_through(make, params):
    verify(make, **params)


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a CUDA GPU, for what config.py decides."""
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")


def test_gpu_takes_weight_transfer_and_logits_processors(make, monkeypatch):
    config = make()
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    config.weight_transfer_config = WeightTransferConfig(backend="ipc")
    check_engine(config, get_settings(config))
    config.model_config.logits_processors = ["mine:Processor"]
    refusals.refuse_model(config.model_config)


def test_attention_only_models_in_a_class_for_hybrids_are_served(make, tiny_model):
    layers = ["attention"] * 3
    model = tiny_model("granitemoehybrid")
    assert get_settings(make(model=str(model))) is not None
    mixed = tiny_model("granitemoehybrid", layer_types=["mamba", *layers[1:]])
    assert "hybrid or state-space models" in refused(lambda: make(model=str(mixed)))


QUANTISED = sorted(name for name in get_args(CacheDType) if is_quantized_kv_cache(name))


@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_gpu_takes_fp8_caches_and_refuses_the_others_by_name(make, monkeypatch, cache_dtype):
    config = make()
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    config.cache_config.cache_dtype = cache_dtype
    if cache_dtype in ("fp8", "fp8_e4m3"):
        check_engine(config, get_settings(config))
        config.cache_config.kv_cache_dtype_skip_layers = ["0"]
        fact = "kv_cache_dtype_skip_layers"
    else:
        fact = f"kv_cache_dtype '{cache_dtype}' on a GPU"
    assert fact in refused(lambda: check_engine(config, get_settings(config)))


def test_gpu_refuses_another_attention_backend(make, on_gpu):
    message = refused(lambda: make(attention_backend="FLASH_ATTN"))
    assert "FLASH_ATTN" in message and "leave it out" in message
