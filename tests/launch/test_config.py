"""Loading configurations: precedence, origins, strictness, all problems at once, round trips."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold import RunConfig
from moefold.launch import schema
from moefold.launch.config import check_world, dump, flatten, from_dict, load, parse_overrides, shipped_configs, to_dict
from moefold.launch.settings import SourceConfig
from moefold.launch.toml_lines import key_lines
from moefold.moe.errors import ConfigError, TopologyError

BASE = """\
[model]
preset = "debug"

[train]
steps = 10
lr = 1e-3
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes TOML files into the working directory, so that origins are short."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text):
        (tmp_path / name).write_text(text)
        return name

    return write_file


def problems_of(*files, **kwargs):
    """where -> (what, origin) of everything that is wrong."""
    with pytest.raises(ConfigError) as error:
        load(*files, **kwargs)
    return {p.where: (p.what, p.origin) for p in error.value.problems}


# --- precedence and origins ---------------------------------------------------------------------------------


def test_precedence_is_default_preset_files_overrides_flags(write):
    base = write("base.toml", BASE + "seed = 1\n[log]\nevery = 2\n")
    over = write("over.toml", "[model]\nnum_layers = 3\n[train]\nlr = 2e-3\nseed = 2\n[log]\nevery = 3\n")
    loaded = load(base, over, overrides={"train.seed": 3, "log.every": 4}, flags={"log.every": 5})
    config, origin = loaded.config, loaded.origins
    assert (config.train.grad_clip, origin["train.grad_clip"]) == (1.0, "default")
    assert (config.model.dim, origin["model.dim"]) == (64, "preset debug")
    assert (config.model.num_layers, origin["model.num_layers"]) == (3, "over.toml:2")
    assert (config.train.steps, origin["train.steps"]) == (10, "base.toml:5")
    assert (config.train.lr, origin["train.lr"]) == (2e-3, "over.toml:4")
    assert (config.train.seed, origin["train.seed"]) == (3, "override")
    assert (config.log.every, origin["log.every"]) == (5, "flag --log.every")


def test_every_value_has_an_origin(write):
    loaded = load(write("a.toml", BASE))
    assert loaded.origins.keys() == flatten(loaded.config).keys()


def test_a_preset_in_a_later_file_wins_but_stays_below_every_file(write):
    a = write("a.toml", BASE + "[model.moe]\ntop_k = 4\n")
    loaded = load(a, write("b.toml", '[model]\npreset = "olmoe-1b-7b"\n'))
    assert loaded.config.model.dim == 2048
    assert loaded.config.model.moe.top_k == 4
    assert loaded.origins["model.dim"] == "preset olmoe-1b-7b"


def test_lists_replace_and_lose_their_old_origins(write):
    a = write("a.toml", BASE + '[[data.sources]]\ntype = "text"\npath = "x"\n[[data.sources]]\ntype = "python-docs"\n')
    b = write("b.toml", '[data]\nsources = [\n  { type = "python-code" },\n]\n')
    first, both = load(a), load(a, b)
    assert [s.type for s in first.config.data.sources] == ["text", "python-docs"]
    assert first.origins["data.sources[1].type"] == "a.toml:11"
    assert first.origins["data.sources[1].weight"] == "default"
    assert [s.type for s in both.config.data.sources] == ["python-code"]
    assert both.origins["data.sources[0].type"] == "b.toml:2"
    assert "data.sources[1].type" not in both.origins


def test_none_unsets_a_setting(write):
    config = load(write("a.toml", BASE + 'grad_clip = "none"\n'), flags={"model.moe": "none", "model.dense_ffn_dim": 96}).config
    assert config.train.grad_clip is None
    assert config.model.moe is None


def test_run_config_load_is_the_same_door(write):
    assert RunConfig.load(write("a.toml", BASE), overrides={"train.lr": 3e-4}).train.lr == 3e-4


def test_nested_and_dotted_overrides_mean_the_same(write):
    a = write("a.toml", BASE)
    dotted = load(a, overrides={"train.optimizer.beta2": 0.9, "train.optimizer.eps": 1e-6}).config
    assert dotted == load(a, overrides={"train": {"optimizer": {"beta2": 0.9, "eps": 1e-6}}}).config
    assert (dotted.train.optimizer.beta2, dotted.train.optimizer.eps) == (0.9, 1e-6)


# --- strictness ---------------------------------------------------------------------------------------------


def test_all_problems_of_all_files_and_flags_come_together(write):
    a = write("a.toml", '[model]\npreset = "debug"\nmoe.topk = 2\n[train]\nsteps = 1.5\nlr = -1.0\n[optim]\nlr = 2\n')
    b = write("b.toml", '[[data.sources]]\ntype = "text"\n\n[[data.sources]]\ntype = "python-code"\nweight = 0\n')
    found = problems_of(a, b, flags=parse_overrides(["--log.every", "often", "--model.num_heads=5"]))
    assert found["model.moe.topk"] == ("unknown key; did you mean 'top_k'?", "a.toml:3")
    assert found["train.steps"] == ("is 1.5, but must be a whole number", "a.toml:5")
    assert found["optim"][1] == "a.toml:7"
    assert found["data.sources[0].path"][0].startswith("is not set, but a source of type 'text' needs one")
    assert found["data.sources[1].weight"] == ("is 0.0, but must be positive", "b.toml:6")
    assert found["log.every"] == ('is "often", but must be a whole number; write it without quotes', "flag --log.every")
    assert "does not divide dim = 64" in found["model.num_heads"][0]
    assert len(found) == 7


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("train.top_k = 1", "train.top_k", "unknown key; did you mean 'model.moe.top_k'?"),
        ("train.seq_len = 1", "train.seq_len", "unknown key; did you mean 'data.seq_len'?"),
        ("zzz.lr = 1", "zzz", "unknown key; sections: model, run, parallel, data, train, checkpoint, log"),
        (
            "log.colour = 1",
            "log.colour",
            "unknown key; keys of [log]: every, tensorboard, comm, gpu, trace_steps, trace_ranks, report",
        ),
        ("train.zzz.lr = 1", "train.zzz", "unknown key; keys of [train]: steps,"),
        ("log = 3", "log", "is 3, but must be a table of settings"),
        ("train.lr = true", "train.lr", "is true, but must be a number"),
        ("train.steps = true", "train.steps", "is true, but must be a whole number"),
        ('train.steps = "8"', "train.steps", 'is "8", but must be a whole number; write it without quotes'),
        ("log.report = 1", "log.report", "is 1, but must be true or false"),
        ("run.name = 3", "run.name", "is 3, but must be a string"),
        ("run.name = 2026-01-02", "run.name", "is 2026-01-02 of type date"),
        ("train.lr = inf", "train.lr", "is inf, but must be a finite number"),
        ('train.schedule = "linear"', "train.schedule", "is \"linear\", but must be 'cosine', 'wsd' or 'constant'"),
        ("data.sources = 3", "data.sources", "is 3, but must be a list"),
        ("data.sources = []", "data.sources", "is empty"),
        (
            'data.sources = [{ type = "text", path = "x", wieght = 1 }]',
            "data.sources[0].wieght",
            "unknown key; did you mean 'weight'?",
        ),
        ('model.preset = "debugg"', "model.preset", "is 'debugg', which is not a preset; did you mean 'debug'?"),
        ("data.seq_len = 512", "data.seq_len", "is 512, longer than model.max_seq_len = 256"),
        ("model.moe.top_k = 9", "model.moe.top_k", "is 9, more than num_experts = 8"),
    ],
)
def test_one_wrong_line_is_named_with_its_line(write, text, where, what):
    found = problems_of(write("base.toml", BASE), write("wrong.toml", f"# comment\n\n{text}\n"))
    assert found[where][0].startswith(what)
    assert found[where][1] == "wrong.toml:3"


def test_a_missing_section_says_how_to_get_one(write):
    found = problems_of(write("a.toml", "[train]\nsteps = 1\n"))
    assert found["model"] == ('is required, but not set; set it, or start from a preset (model.preset = "debug")', "")


def test_a_missing_value_has_no_origin(write):
    found = problems_of(write("a.toml", BASE + "[model.moe]\nnum_experts = 4\n"), overrides={"model.preset": "none"})
    assert found["model.moe.top_k"] == ("is required, but not set", "")


def test_whole_floats_are_whole_numbers(write):
    config = load(write("a.toml", BASE), flags=parse_overrides(["--train.steps", "none", "--train.tokens", "2e9"])).config
    assert config.train.tokens == 2_000_000_000 and isinstance(config.train.tokens, int)


def test_missing_and_broken_files_are_all_named(write):
    broken = write("broken.toml", "[train]\nsteps = 1\nlr = = 2\n")
    found = problems_of("nowhere.toml", broken, flags={"trian.lr": 1})
    assert found["nowhere.toml"][0].startswith("no such file")
    assert found["broken.toml:3"][0].startswith("is not TOML")
    assert found["trian"] == ("unknown key; did you mean 'train'?", "flag --trian.lr")
    # what these files would have said is unknown, so nothing is called missing
    assert len(found) == 3


def test_a_folder_or_binary_file_is_a_config_error(write, tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    found = problems_of("binary.toml", str(tmp_path))
    assert "cannot be read as text" in found["binary.toml"][0]
    assert "cannot be read as text" in found[str(tmp_path)][0]


# --- flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--train.lr", "3e-4"], {"train.lr": 3e-4}),
        (["--train.lr=3e-4"], {"train.lr": 3e-4}),
        (["--train.lr", "-1"], {"train.lr": -1}),
        (["--log.report", "false"], {"log.report": False}),
        (["--train.precision", "bf16"], {"train.precision": "bf16"}),
        (["--run.name", "007"], {"run.name": "007"}),
        (["--run.name", "1e3"], {"run.name": "1e3"}),
        (["--run.name='a b'"], {"run.name": "a b"}),
        (["--run.dir", "a=b"], {"run.dir": "a=b"}),
        (["--run.dir=a=b"], {"run.dir": "a=b"}),
        (["--data.sources", '[{type="text", path="x"}]'], {"data.sources": [{"type": "text", "path": "x"}]}),
        (["--train.seed", "1", "--train.seed", "2"], {"train.seed": 2}),
        (["--train.seed", "1\nlr = 2"], {"train.seed": "1\nlr = 2"}),
    ],
)
def test_flags(args, expected):
    assert parse_overrides(args) == expected


def test_flags_that_cannot_be_read_are_all_named():
    with pytest.raises(ConfigError) as error:
        parse_overrides(["--log.report", "--lr", "3", "--train.lr"])
    assert [p.where for p in error.value.problems] == ["--log.report", "--lr", "3", "--train.lr"]
    assert "needs a value, for instance --log.report true" in str(error.value)


# --- writing ------------------------------------------------------------------------------------------------


def random_configs():
    """Legal configurations that differ from the defaults in every kind of value: None, lists, floats, text, nested records."""
    overrides = st.fixed_dictionaries(
        {
            "model": st.just({"preset": "debug"}),
            "train.steps": st.integers(1, 10**6),
            "train.lr": st.floats(1e-12, 10.0, allow_subnormal=False),
            "train.grad_clip": st.none() | st.floats(1e-3, 1e3),
            "model.moe.capacity_factor": st.none() | st.floats(0.5, 8.0),
            "run.name": st.text(min_size=1),
            "run.dir": st.none() | st.text(min_size=1).filter(lambda text: text != "none"),
            "data.sources": st.lists(
                st.fixed_dictionaries({"type": st.just("text"), "path": st.just("x"), "weight": st.floats(0.1, 5.0)}),
                min_size=1,
                max_size=3,
            ).map(lambda sources: [{**source, "name": f"n{i}"} for i, source in enumerate(sources)]),
            "log.report": st.booleans(),
        }
    )
    return overrides.map(lambda values: load(overrides=values).config)


@settings(max_examples=40, deadline=None)
@given(random_configs())
def test_written_configurations_load_again_as_the_same(config):
    assert from_dict(tomllib.loads(dump(config))) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_dump_names_every_setting_that_is_set(write):
    config = load(write("a.toml", BASE), flags={"train.grad_clip": "none"}).config
    table = tomllib.loads(dump(config))
    assert table["train"]["grad_clip"] == "none"
    assert table["model"]["moe"]["router"]["renormalize"] is True
    assert "dir" not in table["run"]


# --- line numbers -------------------------------------------------------------------------------------------

TRICKY = '''\
a = 1 # = 2
"quoted key" = 2
t.u = """
[fake]
b = 1
"""
l = [
  1, # ]
  "]",
]
[table]
x = '[no]'
y = { z = 1 }
[[items]]
n = 1
[items.sub]
m = 2

[[items]]
s = \'\'\'
n = 9\'\'\'
n = 3
'''


def test_line_numbers_survive_strings_comments_and_nesting():
    assert tomllib.loads(TRICKY)
    assert key_lines(TRICKY) == {
        "a": 1,
        "quoted key": 2,
        "t.u": 3,
        "l": 7,
        "table": 11,
        "table.x": 12,
        "table.y": 13,
        "items[0]": 14,
        "items[0].n": 15,
        "items[0].sub": 16,
        "items[0].sub.m": 17,
        "items[1]": 19,
        "items[1].s": 20,
        "items[1].n": 22,
    }


def test_an_inline_table_gives_its_line_to_its_values(write):
    loaded = load(write("a.toml", BASE + "\noptimizer = { beta1 = 0.8 }\n"))
    assert loaded.origins["train.optimizer.beta1"] == "a.toml:8"
    assert loaded.origins["train.optimizer.beta2"] == "default"


# --- layouts, schema, shipped files -------------------------------------------------------------------------


def test_a_layout_that_does_not_fit_names_the_lines(write):
    loaded = load(write("a.toml", BASE + "[parallel]\nep = 3\ntp = 3\n"))
    with pytest.raises(TopologyError) as error:
        check_world(loaded, 4)
    assert {p.where: p.origin for p in error.value.problems} == {"parallel.ep": "a.toml:8", "parallel.tp": "a.toml:9"}
    assert check_world(load("a.toml", overrides={"parallel": {"ep": 4, "tp": 2}}), 8).dp == 4


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_load_by_name_and_say_what_they_are(name):
    loaded = load(name)
    assert loaded.origins["run.name"].startswith(f"{name}.toml:")
    assert shipped_configs()[name].read_text().startswith("# ")


@pytest.mark.parametrize(("name", "world"), [("quickstart", 4), ("olmoe-1b-7b-8xh100", 8)])
def test_shipped_configurations_fit_the_hardware_they_name(name, world):
    check_world(load(name), world)


def test_a_file_of_that_name_goes_before_the_shipped_one(write):
    assert load(write("quickstart", BASE)).config.train.steps == 10


def test_schema_lists_every_setting_with_type_default_and_description(write):
    listed = {s.path: s for s in schema.settings()}
    scaled = {"model.rope_scaling": {"kind": "linear", "factor": 2.0}}  # a table that a model need not have
    full = load(write("a.toml", BASE), overrides=scaled).config
    flat = {path.replace("[0]", "[]").replace("[1]", "[]") for path in flatten(full)}
    assert listed.keys() == flat
    assert listed["train.steps"] == schema.Setting("train.steps", "int | none", "none", "Optimizer steps; give this or `tokens`.")
    assert listed["log.report"].default == "true"
    assert listed["model.dim"].default == "required"
    assert listed["train.schedule"].type == "cosine | wsd | constant"


def test_loading_imports_no_torch(write):
    code = (
        f"import sys; from moefold.launch.config import load; load({write('a.toml', BASE)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_records_are_frozen(write):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(write("a.toml", BASE)).config.train.lr = 1.0


@pytest.mark.parametrize(
    ("path", "domain"), [("books/law.jsonl", "law"), ("books/", "books"), ("books/*.txt", "text"), (".hidden", "text")]
)
def test_domain_of_a_source_without_a_name(path, domain):
    assert SourceConfig(type="text", path=path).domain == domain
