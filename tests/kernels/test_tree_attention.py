"""`tree_attention` in Triton's interpreter against its naive twin in float64."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from bita_kernels import tree_attention as tree_attention_module
from bita_kernels.attention_config import AttentionConfig
from bita_kernels.tree_attention import SHORT_CONTEXT, Workspace, tree_attention
from bita_kernels.tree_attention_naive import tree_attention_naive
from bita_kernels.tree_table import TreeTable
from random_trees import int32, random_template
from triton.language.extra import cuda
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from bita_vllm.tree import Template, TemplateTable

NAN = float("nan")
CASES = 500


@dataclass
class Case:
    """One batch: requests with blocks of any line, cut or whole, among prefills and plain decodes."""

    arguments: dict
    options: dict

    @classmethod
    def random(cls, seed: int, **fixed) -> "Case":
        rng = np.random.default_rng(seed)
        pick = lambda name, *choices: fixed.get(name, choices[rng.integers(len(choices))])  # noqa: E731
        table = TemplateTable(fixed.get("template") or random_template(rng))
        num_requests = int(rng.integers(1, 4))
        line = rng.integers(-1, len(table.num_rows), num_requests)
        most = table.template.num_rows
        causal = rng.integers(1, most + 1, num_requests)
        whole = np.where(line >= 0, table.num_rows[line], causal)
        padded = np.where(line >= 0, most, whole)
        num_queries = np.where(rng.random(num_requests) < 0.3, padded, whole)
        cut = rng.random(num_requests) < 0.3
        num_queries = np.where(cut, rng.integers(1, num_queries + 1), num_queries)
        context = rng.integers(0, pick("context", 3, 40, 300), num_requests)
        block_size = pick("block_size", 16, 32, 48)
        group, num_kv_heads = pick("group", 1, 3, 4), pick("heads", 1, 2)
        head_size = pick("head_size", 16, 64, 80)
        dtype = pick("dtype", torch.float32)
        cache_dtype = pick("cache_dtype", dtype)
        query_dtype = pick("query_dtype", dtype)
        seq_lens = context + num_queries
        blocks = -(-seq_lens // block_size)
        pool = rng.permutation(int(blocks.sum()) + 3)
        block_table = np.full((num_requests, int(blocks.max()) + 1), len(pool) - 1)
        taken = 0
        for request, count in enumerate(blocks):
            block_table[request, :count] = pool[taken : taken + count]
            taken += count
        shared = int(min(context[0], context[-1])) // block_size
        block_table[-1, :shared] = block_table[0, :shared]  # a prefix in common

        def normal(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

        # Keys and values side by side, as vLLM keeps them; NaN wherever nothing of a sequence lies.
        cache = torch.full((len(pool), num_kv_heads, block_size, 2 * head_size), NAN, dtype=dtype)
        for request in range(num_requests):
            slots = np.arange(seq_lens[request])
            pages = block_table[request, slots // block_size]
            cache[pages, :, slots % block_size] = normal(len(slots), num_kv_heads, 2 * head_size)
        keys, values = cache.to(cache_dtype).transpose(1, 2).split(head_size, dim=-1)
        num_heads, num_prompt = group * num_kv_heads, pick("prompt", 0, 3, 16)
        query = normal(int(num_queries.sum()) + 2, num_heads, head_size)
        arguments = {
            "query": query.to(query_dtype),
            "key_cache": keys,
            "value_cache": values,
            "block_table": int32(block_table),
            "query_start": int32(np.concatenate([[0], np.cumsum(num_queries)])),
            "seq_lens": int32(seq_lens),
            "line": int32(line),
            "table": TreeTable.of(table, "cpu"),
            "prompt_keys": normal(num_prompt, num_kv_heads, head_size),
            "prompt_values": normal(num_prompt, num_kv_heads, head_size),
        }
        quantised = cache_dtype != dtype
        options = {
            "scale": head_size**-0.5,
            "window": pick("window", 0, 0, 2, 7, 33),
            "softcap": pick("softcap", 0.0, 0.0, 5.0),
            "sinks": pick("sinks", None, None, torch.from_numpy(rng.standard_normal(num_heads))),
            "k_scale": torch.tensor(1.3) if quantised else None,
            "v_scale": torch.tensor(0.5) if quantised else None,
            "q_scale": torch.tensor(0.7) if query_dtype != dtype else None,
        }
        if options["sinks"] is not None:
            options["sinks"] = options["sinks"].to(dtype)
        return cls(arguments, options)

    def config(self, **changes) -> AttentionConfig:
        """Small tiles and splits, so that short contexts have several."""
        query, keys, table = (self.arguments[n] for n in ("query", "key_cache", "table"))
        group = query.shape[1] // keys.shape[2]
        dtype = self.arguments["prompt_keys"].dtype
        config = AttentionConfig.choose(
            keys.shape[3], dtype, group, table.num_rows, num_kv_heads=keys.shape[2]
        )
        return replace(config, block_m=64, block_n=32, split=32, per_doubling=2, **changes)

    def run(
        self,
        parallel: bool = False,
        config: AttentionConfig | None = None,
        programs: int | None = None,
        short: int = 0,
    ) -> torch.Tensor:
        query, line, table = (self.arguments[n] for n in ("query", "line", "table"))
        config = config or self.config()
        counts = self.arguments["query_start"].diff()
        lengths = {
            "max_query_len": int(counts.max()),
            "max_seq_len": int(self.arguments["seq_lens"].max()),
        }
        workspace = None
        if parallel:
            workspace = Workspace.empty(
                config, len(line), table.num_rows, *query.shape[1:], lengths["max_seq_len"], "cpu"
            )
            workspace.acc.fill_(NAN)
            workspace.stats.fill_(NAN)
            workspace = replace(workspace, programs=programs or workspace.programs, short=short)
        out = torch.full_like(query, NAN, dtype=self.arguments["prompt_keys"].dtype)
        tree_attention(
            **self.arguments, out=out, config=config, workspace=workspace, **lengths, **self.options
        )
        return out

    def naive(self) -> torch.Tensor:
        """In float64."""
        wide = {
            name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in {**self.arguments, **self.options}.items()
        }
        out = torch.full_like(wide["query"], NAN)
        tree_attention_naive(**wide, out=out)
        return out

    def select(self, requests: list[int]) -> "Case":
        """The same requests in another company or order."""
        start = self.arguments["query_start"].tolist()
        rows = [torch.arange(start[r], start[r + 1]) for r in requests]
        counts = torch.tensor([0] + [len(r) for r in rows]).cumsum(0).int()
        arguments = {
            **self.arguments,
            "query": self.arguments["query"][torch.cat(rows)],
            "query_start": counts,
            **{n: self.arguments[n][requests] for n in ("block_table", "seq_lens", "line")},
        }
        return Case(arguments, self.options)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest value; rows of no request must be left alone."""
    outside = want.isnan()
    assert torch.equal(got.isnan(), outside)
    largest = want[~outside].abs().max().item()
    return (got.double() - want)[~outside].abs().max().item() / max(largest, 1e-30)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
def test_float32_against_float64(chunk):
    worst, several_splits, parallel_runs = 0.0, 0, 0
    for seed in range(chunk * CASES // 10, (chunk + 1) * CASES // 10):
        case = Case.random(seed)
        parallel = seed % 3 == 0
        worst = max(worst, error(case.run(parallel), case.naive()))
        several_splits += int(case.arguments["seq_lens"].max() > 64)
        parallel_runs += parallel
    print(f"{CASES // 10} cases, worst relative error {worst:.1e}")
    assert worst < 1e-5
    assert several_splits > 5 and parallel_runs > 5


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_head_sizes(head_size):
    case = Case.random(head_size, head_size=head_size, heads=1, group=4, context=40)
    assert error(case.run(), case.naive()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    worst = 0.0
    for seed in range(12):
        case = Case.random(seed, dtype=dtype)
        worst = max(worst, error(case.run(seed % 2 == 0), case.naive()))
    print(f"{dtype}: worst relative error {worst:.1e}")
    assert worst < 1e-2


@pytest.mark.parametrize("block_size", [256, 784])
def test_largest_block_and_cache_blocks(block_size):
    """R = 253, eight words of ancestor bits; cache blocks longer than a tile and no power of two."""
    nodes = [(row // 4, row % 4) for row in range(60)]
    groups = dict.fromkeys(range(61), 3) | dict.fromkeys((0, 1, 2, 3), 5)
    template = Template.build([*nodes, (60, 0)], groups)
    assert template.num_rows > 250
    case = Case.random(
        1, template=template, block_size=block_size, context=900, group=1, heads=1, head_size=16
    )
    case.arguments["line"].fill_(template.max_depth)
    config = replace(case.config(), block_n=128, split=256)
    assert error(case.run(parallel=True, config=config), case.naive()) < 1e-5


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float8_e4m3fn])
def test_fp8_kv_cache(query_dtype):
    """vLLM quantises the queries, too, on CUDA."""
    for seed in range(6):
        case = Case.random(seed, cache_dtype=torch.float8_e4m3fn, query_dtype=query_dtype)
        assert error(case.run(seed % 2 == 0), case.naive()) < 1e-5


def test_fp8_queries_and_cache_of_a_bf16_model():
    worst = 0.0
    for seed in range(6):
        fp8 = torch.float8_e4m3fn
        case = Case.random(seed, dtype=torch.bfloat16, cache_dtype=fp8, query_dtype=fp8)
        worst = max(worst, error(case.run(seed % 2 == 0), case.naive()))
    print(f"worst relative error {worst:.1e}")
    assert worst < 1e-2


@pytest.mark.parametrize("rows", [4, 16])
def test_shipped_tiles_and_splits(rows):
    """The configuration that an engine would take, a context over several doublings of its splits."""
    template = Template.build([(0, 0)], {0: 1, 1: rows - 3})
    case = Case.random(
        3, template=template, context=1300, head_size=64, group=4, heads=1, block_size=48
    )
    config = AttentionConfig.choose(64, torch.bfloat16, 4, rows, num_kv_heads=64)
    assert config.block_m == 4 * rows
    assert config.num_splits(1300) > 2 * config.per_doubling
    for parallel in (False, True):
        assert error(case.run(parallel, config), case.naive()) < 1e-5


def test_splits_have_a_fixed_place():
    """The context so far says where a split ends, never the longest sequence; few at any length."""
    config = AttentionConfig.choose(128, torch.bfloat16, 4, 16, num_kv_heads=8)
    counts = [config.num_splits(n) for n in range(1, 20000)]
    assert counts[: 2 * config.split] == [1] * config.split + [2] * config.split
    assert set(np.diff(counts)) == {0, 1}
    assert config.num_splits(2**20) < 100


@pytest.mark.parametrize("rows", [4, 8, 16, 24, 52])
@pytest.mark.parametrize("slots", [1000, 8000, 131072])
def test_one_request_fills_a_gpu(rows, slots):
    """Llama-3-8B: programs with work, where splits run side by side; nothing follows from max_model_len.

    Half of a large GPU at 1000 slots: shorter splits would write more partial results than they read keys and values.
    """
    config = AttentionConfig.choose(128, torch.bfloat16, 4, rows, num_kv_heads=8)
    tiles = 8 * math.ceil(4 * rows / config.block_m)
    assert tiles * config.num_splits(slots) >= (64 if slots == 1000 else 128)


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_programs_of_a_launch_do_not_change_the_result(programs):
    case = Case.random(5, context=300, template=Template.build([(0, 0), (0, 1)], {0: 2}))
    used = slice(int(case.arguments["query_start"][-1]))
    assert torch.equal(case.run(parallel=True, programs=programs)[used], case.run()[used])


@pytest.mark.parametrize("short", [1, 100, 4096])
@pytest.mark.parametrize("window", [0, 40])
def test_short_contexts_go_in_turn_beside_long_ones(short, window):
    """In the same launch, in the same bits; a request's own context says how it goes."""
    compared = 0
    for seed in range(4):
        case = Case.random(seed, context=300, window=window)
        used = slice(int(case.arguments["query_start"][-1]))
        beside = case.run(parallel=True, programs=5, short=short)[used]
        assert torch.equal(beside, case.run()[used])
        compared += len(beside)
    assert compared > 20


@pytest.mark.parametrize("short", [0, SHORT_CONTEXT])
def test_every_program_of_an_early_merge_waits_for_the_attention(short, monkeypatch):
    """Those without work too: the next launch waits for the merge alone. On a GPU of sm_90 or newer."""
    case = Case.random(5, context=300, template=Template.build([(0, 0), (0, 1)], {0: 2}))
    late, calls = case.run(parallel=True, programs=5, short=short), []
    record = lambda name: lambda: calls.append((name, *interpreter_builder.grid_idx))  # noqa: E731
    monkeypatch.setattr(cuda, "gdc_launch_dependents", record("attention"))
    monkeypatch.setattr(cuda, "gdc_wait", record("merge"))
    monkeypatch.setattr(tree_attention_module, "starts_early", lambda device: True)
    monkeypatch.setattr(tree_attention_module, "_plans", {})
    grids, call = [], GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor,
        "__call__",
        lambda self, *a, **k: grids.append(self.grid) or call(self, *a, **k),
    )
    early = case.run(parallel=True, programs=5, short=short)
    used = slice(int(case.arguments["query_start"][-1]))
    assert torch.equal(early[used], late[used])
    attention, merge = (list(np.ndindex(*grid)) for grid in grids)
    assert sorted(calls) == sorted(
        [("attention", *at) for at in attention] + [("merge", *at) for at in merge]
    )


@pytest.mark.parametrize(("sm", "early"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_the_merge_starts_early_from_sm_90_on(sm, early, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: sm)
    assert tree_attention_module.starts_early(torch.device("cuda")) == early
    assert not tree_attention_module.starts_early(torch.device("cpu"))


def test_few_tiles_have_their_splits_side_by_side():
    workspace = Workspace(torch.empty(0), torch.empty(0), programs=264, short=SHORT_CONTEXT)
    assert workspace.in_turn_slots(8 * 2) == 0, "one request of an 8B model, two tiles of rows"
    assert workspace.in_turn_slots(8 * 8) == SHORT_CONTEXT


def test_arguments_are_checked_once_for_a_layout(monkeypatch):
    checked = []
    whole = tree_attention_module.check_arguments
    monkeypatch.setattr(
        tree_attention_module,
        "check_arguments",
        lambda *args, **kwargs: checked.append(whole(*args, **kwargs)),
    )
    monkeypatch.setattr(tree_attention_module, "_plans", {})
    case = Case.random(5)
    for parallel in (False, True, False):
        case.run(parallel)
    assert len(checked) == 1
    longer = {**case.arguments, "query": torch.cat([case.arguments["query"]] * 2)}
    Case(longer, case.options).run()
    assert len(checked) == 2


@pytest.mark.slow
def test_result_does_not_depend_on_the_batch():
    """Bit for bit: alone, in company, in another order, with splits side by side or in turn."""
    compared = 0
    for seed in range(40):
        case = Case.random(seed)
        together, start = case.run(), case.arguments["query_start"].tolist()
        assert torch.equal(case.run(parallel=True)[: start[-1]], together[: start[-1]])
        n = len(case.arguments["line"])
        backwards = case.select(list(range(n))[::-1]).run()
        for request in range(n):
            rows = together[start[request] : start[request + 1]]
            alone = case.select([request]).run(parallel=seed % 2 == 0)
            assert torch.equal(alone, rows)
            behind = start[-1] - start[request + 1]
            assert torch.equal(backwards[behind : behind + len(rows)], rows)
            compared += len(rows)
    print(f"{compared} rows compared")
    assert compared > 300


BAD = {
    "query": (lambda c: {"query": c["query"][0]}, "query has shape"),
    "head size": (lambda c: {"query": c["query"][..., :8].contiguous()}, "query has head size 8"),
    "cache dtype": (lambda c: {"key_cache": c["key_cache"].double()}, "key_cache has dtype"),
    "values": (lambda c: {"value_cache": c["value_cache"][:, :1]}, "value_cache has shape"),
    "heads": (lambda c: {"query": c["query"][:, :1].contiguous()}, "query has 1 heads"),
    "table of blocks": (
        lambda c: {"block_table": c["block_table"].long()},
        "block_table has dtype",
    ),
    "starts": (lambda c: {"query_start": c["query_start"][1:]}, "query_start has shape"),
    "strides": (
        lambda c: {"query": c["query"].transpose(0, 2).contiguous().transpose(0, 2)},
        "strides",
    ),
    "prompt": (lambda c: {"prompt_values": c["prompt_values"][:1]}, "prompt_values has shape"),
    "fp8 without scale": (
        lambda c: {n: c[n].to(torch.float8_e4m3fn) for n in ("key_cache", "value_cache")},
        "k_scale is None",
    ),
    "scale without fp8": (lambda c: {"k_scale": torch.ones(1)}, "k_scale is given"),
    "fp8 query without scale": (
        lambda c: {"query": c["query"].to(torch.float8_e4m3fn)},
        "q_scale is None",
    ),
    "scale without fp8 query": (lambda c: {"q_scale": torch.ones(1)}, "q_scale is given"),
    "fp8 result": (
        lambda c: {"out": c["query"].to(torch.float8_e4m3fn)},
        "out has dtype torch.float8_e4m3fn",
    ),
    "window": (lambda c: {"window": -1}, "window is -1"),
    "longest": (lambda c: {"max_seq_len": 10**6}, "max_seq_len is 1000000"),
    "rows": (lambda c: {"max_query_len": 0}, "max_query_len is 0"),
    "prefill": (
        lambda c: {
            "max_query_len": c["table"].num_rows + 1,
            **{n: torch.cat([c["query"]] * 9) for n in ("query", "out")},
        },
        "prefill is for other kernels",
    ),
    "scale": (lambda c: {"scale": -1.0}, "scale is -1.0"),
    "workspace": (
        lambda c: {"workspace": Workspace(torch.empty(3), torch.empty(2), 1)},
        "workspace holds 3 numbers",
    ),
    "softcap": (lambda c: {"softcap": math.nan}, "softcap is nan"),
    "sinks": (lambda c: {"sinks": torch.ones(1)}, "sinks has shape"),
    "split": (lambda c: {"config": replace(c["config"], split=24)}, "multiple of its tile's 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    case = Case.random(1, heads=2, group=3, prompt=3, cache_dtype=torch.float32)
    change, sentence = BAD[name]
    out = torch.full_like(case.arguments["query"], NAN)
    given = {
        **case.arguments,
        **case.options,
        "config": case.config(),
        "max_query_len": 4,
        "max_seq_len": 64,
    }
    given |= {"out": out, **change(given)}
    if given["query"].shape != out.shape:
        given["out"] = given["query"]
    with pytest.raises(ValueError, match=sentence):
        tree_attention(**given)
    assert out.isnan().all()
