"""Adapter, ladder and template files from elsewhere: refused in one sentence or harmless, whatever they hold.

Every file is a good one with a few mutations. Memory is bounded, so that what allocates without end fails.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testbed.tiny_models import make_tiny_model

from bita_vllm.adapter.checkpoint import Adapter
from bita_vllm.adapter.config import AdapterConfig, AdapterError
from bita_vllm.tree import Template, TemplateError, search
from bita_vllm.tree.ladder import Ladder, LadderError
from bita_vllm.tree.template_set import TemplateSet, set_within

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "adapters" / "smollm2-135m-instruct"
REFUSALS = (AdapterError, LadderError, TemplateError)
MAX_MORE_BYTES = 2**31
MUTATIONS = settings(
    max_examples=2000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

HOSTILE = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**31, 10**9, 10**30, 1e308, math.nan, math.inf, -math.inf, 0.5, 3.0]
    ),
    st.sampled_from(["", "x", "0", "-1", "1e9", "\u0000", [], {}, [[]], [None], {"0": 10**9}]),
    st.lists(st.integers(-(10**9), 10**9), max_size=3),
    st.text(max_size=5),
)
NUM_CHANGES = st.integers(1, 3)
CHANGES = st.sampled_from(["replace", "replace", "replace", "drop", "repeat"])


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MORE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place of a JSON value."""
    yield path
    if isinstance(content, dict):
        items: Any = content.items()
    elif isinstance(content, list):
        items = list(enumerate(content))[:3]  # the others are alike
    else:
        return
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def mutated(draw: Callable, content: Any) -> Any:
    """The value with one to three of its places replaced, dropped or doubled."""
    result = json.loads(json.dumps(content))
    for _ in range(draw(NUM_CHANGES)):
        inner = list(places(result))[1:]
        if not inner:
            return draw(HOSTILE)
        # By number: `sampled_from` looks at every place first, which takes longer than all the rest.
        *path, last = inner[draw(st.integers(0, len(inner) - 1))]
        owner = result
        for key in path:
            owner = owner[key]
        change = draw(CHANGES)
        if change == "drop":
            del owner[last]
        elif change == "repeat" and isinstance(owner[last], list):
            owner[last] = owner[last] * 30
        else:
            owner[last] = deepcopy(draw(HOSTILE))  # later mutations change it in place
    return result


@contextmanager
def one_sentence() -> Iterator[None]:
    """Refused in a sentence of ours, or nothing."""
    try:
        yield
    except REFUSALS as error:
        message = str(error)
        assert message.endswith((".", "}}.")) or message.endswith("}}"), message
        assert "\n" not in message and "Traceback" not in message and len(message) < 1500, message


TEMPLATE = Template.from_widths([3, 2, 1], 3)
LADDER = Ladder(
    [TemplateSet((TEMPLATE,)), TemplateSet((Template.from_widths([1], 1),))],
    [(1, 4, 27), (5, 8, 3), (9, 9, 0)],
    {"device": "a machine", "step_seconds": [[1, 1, 0.01], [1, 28, 0.02]]},
)


@MUTATIONS
@given(content=mutated(TEMPLATE.to_dict()))
def test_template_files(tmp_path, content):
    path = tmp_path / "template.json"
    path.write_text(json.dumps(content))
    with one_sentence():
        assert Template.load(path).num_rows <= 256


def ladder_content() -> Any:
    return {
        "bita_ladder": 2,
        "batch_sizes": [list(entry) for entry in LADDER.batch_sizes],
        "template_sets": [one.to_dict() for one in LADDER.template_sets],
        "provenance": dict(LADDER.provenance),
    }


@MUTATIONS
@given(content=mutated(ladder_content()))
def test_ladder_files(tmp_path, content):
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(content))
    with one_sentence():
        ladder = Ladder.load(path)
        ladder.check(3)
        assert len(ladder.lookup(1024)) == 1025
        ladder.describe()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("bita_ladder",), "x" * 10**5),
        (("bita_ladder",), list(range(10**5))),
        (("batch_sizes",), [[2, 2 + i, 3] for i in range(9000)]),
        (("template_sets", 0, "templates", 0, "groups"), {"9" * 5000: 1}),
        (("template_sets", 0, "templates", 0, "groups"), {"1\n": 1}),
    ],
    ids=["version", "list as version", "ranges", "long row name", "row name of two lines"],
)
def test_messages_shorten_what_a_ladder_holds(tmp_path, path, value):
    owner = content = ladder_content()
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps(content))
    with pytest.raises(LadderError) as error:
        Ladder.load(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("content", [[1], None, 5, "x"], ids=["list", "null", "number", "text"])
def test_a_ladder_that_is_no_object_is_refused_in_plain_words(tmp_path, content):
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps(content))
    with pytest.raises(LadderError, match="must hold a JSON object"):
        Ladder.load(file)


def small_config() -> Any:
    """The shipped adapter's config.json with a few of its template sets, and less training history."""
    content = json.loads((SHIPPED / "config.json").read_text())
    sets = content["acceptance"]["template_sets"]
    content["acceptance"]["template_sets"] = {rows: sets[rows] for rows in ("5", "16")}
    content["training"] = {}
    return content


@pytest.fixture
def drafts_made_once(monkeypatch):
    """All drafts of a few rows, which the search makes anew for any statistics: half of its time."""
    every_shape = search.every_shape
    made = lru_cache(32)(lambda *sizes: list(every_shape(*sizes)))
    monkeypatch.setattr(search, "every_shape", made)


@MUTATIONS
@given(content=mutated(small_config()))
def test_adapter_configs(tmp_path, drafts_made_once, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with one_sentence():
        config = AdapterConfig.load(tmp_path)
        for rows in (5, 16, 12):  # the last is searched for, the longer the larger it is
            assert set_within(rows, config.num_mask_tokens, config.acceptance).first.num_rows <= 256


@pytest.fixture(scope="module")
def adapter_with_deltas(tmp_path_factory) -> Path:
    """A small one, and what its files hold."""
    from e2e.engines import make_adapter

    model = make_tiny_model(tmp_path_factory.mktemp("model"), "llama", "float32")
    return make_adapter(model, tmp_path_factory.mktemp("adapter") / "a", lora_rank=2)


def load(folder: Path) -> None:
    Adapter.load(folder, AdapterConfig.load(folder).model)


@MUTATIONS
@given(data=st.data())
def test_lora_configs(adapter_with_deltas, tmp_path, data):
    folder = copied(adapter_with_deltas, tmp_path)
    file = folder / "mask_lora" / "adapter_config.json"
    content = json.loads((adapter_with_deltas / "mask_lora" / file.name).read_text())
    file.write_text(json.dumps(data.draw(mutated(content))))
    with one_sentence():
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "mask_lora/adapter_model.safetensors"])
@MUTATIONS
@given(data=st.data())
def test_safetensors_headers(adapter_with_deltas, tmp_path, name, data):
    folder = copied(adapter_with_deltas, tmp_path)
    whole = (adapter_with_deltas / name).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    changed = json.dumps(data.draw(mutated(header))).encode()
    size = data.draw(st.sampled_from([len(changed), len(changed), len(changed), 0, 2**40, 2**63]))
    (folder / name).write_bytes(struct.pack("<Q", size) + changed + whole[8 + length :])
    with one_sentence():
        load(folder)


def copied(adapter: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"nodes": [[0, 0]], "groups": {"0": 10**9}}, ["groups.0", "1000000000", "at most 16"]),
        ({"nodes": [[0, math.inf]], "groups": {"0": 1}}, ["nodes.0.1", "inf", "whole number"]),
        ({"nodes": [[0, 0]] * 10**5, "groups": {"0": 1}}, ["nodes", "at most 256 long"]),
    ],
)
def test_sizes_are_refused_before_anything_is_built(tmp_path, change, facts):
    path = tmp_path / "template.json"
    path.write_text(json.dumps(change))
    with pytest.raises(TemplateError) as error:
        Template.load(path)
    assert all(fact in str(error.value) for fact in facts)


def changed_acceptance(tmp_path: Path, change: Callable[[dict], None]) -> Path:
    content = small_config()
    change(content["acceptance"])
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (
            lambda a: a["conditional_rank_probability"][0][0][0].__setitem__(0, math.nan),
            ["conditional_rank_probability.0.0.0.0", "nan"],
        ),
        (lambda a: a["rank_probability"][0].__setitem__(0, 1.5), ["rank_probability.0.0", "1.5"]),
        (
            lambda a: a["template_sets"]["16"]["templates"][0]["groups"].__setitem__("0", 9),
            ["16 rows", "9 rows", "3 mask tokens"],
        ),
        (
            lambda a: a["template_sets"]["16"]["templates"][0].__setitem__(
                "nodes", [[row, 0] for row in range(5)]
            ),
            ["16 rows", "depth 5", "3 mask tokens"],
        ),
        (lambda a: a["template_sets"]["5"].__setitem__("gain", 1e6), ["gain", "1000000"]),
    ],
    ids=["nan", "over-1", "masks-it-lacks", "deeper-than-masks", "gain"],
)
def test_statistics_that_say_nonsense_are_refused(tmp_path, change, facts):
    with pytest.raises((AdapterError, TemplateError)) as error:
        config = AdapterConfig.load(changed_acceptance(tmp_path, change))
        set_within(5, config.num_mask_tokens, config.acceptance)
    assert all(fact in str(error.value) for fact in facts), str(error.value)


def test_a_huge_or_deep_file_is_refused(tmp_path):
    path = tmp_path / "template.json"
    path.write_text("[" * 10**6)
    with pytest.raises(TemplateError, match="nested too deeply"):
        Template.load(path)
    with open(path, "wb") as file:
        file.truncate(2**34)
    with pytest.raises(TemplateError, match="17179869184 bytes"):
        Template.load(path)
