"""Policies of users by name: in files, on command lines, in installed packages."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from less import H2O, LessConfig, Policy, Sidekick, SinkRecent
from less.policies import (
    import_policies,
    policy_from_dict,
    policy_from_text,
    policy_to_dict,
    registry,
)
from less.policies.base import checked_at_capacity

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs" / "policies.md").read_text()
EXAMPLE = re.findall(r"^```python\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)[0]
WRITTEN = {"name": "SmallestKeys", "budget": 64, "recent": 8}

pytestmark = pytest.mark.usefixtures("fresh_registry")


@pytest.fixture
def file(tmp_path):
    """The documented policy in a file of its own."""
    path = tmp_path / "smallest_keys.py"
    path.write_text(EXAMPLE)
    return path


def newest(budget_of=lambda self: self.size):
    """A policy class that keeps the newest tokens."""

    @dataclass(frozen=True)
    class Newest(Policy):
        size: int

        @property
        def capacity(self):
            return budget_of(self)

        def rank(self, tokens):
            return tokens.position.float()

    return Newest


# -- names -------------------------------------------------------------------------------------


def test_a_class_statement_gives_the_policy_a_name():
    Newest = newest()
    assert policy_from_dict({"name": "Newest", "size": 3}) == Newest(3)
    config = LessConfig(tokens=3, policy=Newest(3))
    assert LessConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_abstract_class_has_no_name_and_its_concrete_child_has_one():
    class Base(Policy):
        @property
        def capacity(self):
            return 1

    with pytest.raises(ValueError, match="policy: name must be one of .*, got 'Base'"):
        policy_from_dict({"name": "Base"})

    @dataclass(frozen=True)
    class Child(Base):
        def rank(self, tokens):
            return tokens.score

    assert policy_from_dict({"name": "Child"}) == Child()


def test_of_two_classes_of_one_name_the_latest_counts():
    newest()
    latest = newest(lambda self: self.size + 1)
    assert type(policy_from_dict({"name": "Newest", "size": 3})) is latest


@pytest.mark.parametrize("name", ["Full", "H2O", "SinkRecent"])
def test_the_name_of_a_built_in_policy_is_refused_and_stays_its_own(name):
    built_in = registry.find("policy", name)
    with pytest.raises(ValueError, match=f"Policy: {name} is the name of a built-in policy"):
        type(name, (built_in,), {})
    assert registry.find("policy", name) is built_in


def test_an_unknown_name_says_how_to_make_it_known():
    for name in ("LRU", None, ["H2O"]):
        with pytest.raises(ValueError, match="policy: name must be one of") as refused:
            policy_from_dict({"name": name})
        assert repr(name) in str(refused.value)
        for way in ("Import the module", "less-kv --import", "imports=", "'less.policies'"):
            assert way in str(refused.value)


# -- what is written can be read ---------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.zeros(1), {1, 2}])
def test_a_setting_that_json_cannot_hold_is_refused_when_it_is_written(value):
    with pytest.raises(ValueError, match="the settings of Newest do not fit into JSON"):
        policy_to_dict(newest()(value))


def test_training_refuses_a_policy_that_cannot_be_written_before_anything_else():
    pytest.importorskip("transformers")
    from less.fit import train

    with pytest.raises(ValueError, match="the settings of Newest do not fit into JSON"):
        train(None, (), newest()({1}))


def test_a_policy_that_would_be_read_back_as_another_is_refused_when_it_is_written():
    @dataclass(frozen=True)
    class Doubled(newest()):
        def __post_init__(self):
            object.__setattr__(self, "size", 2 * self.size)

    with pytest.raises(ValueError, match="Doubled is read back with other settings"):
        LessConfig(tokens=2, policy=Doubled(1)).to_dict()


def test_a_class_that_is_no_dataclass_is_refused():
    class Plain(Policy):
        capacity = 4

        def rank(self, tokens):
            return tokens.score

    with pytest.raises(ValueError, match="policy: Plain must be a dataclass"):
        policy_from_dict({"name": "Plain"})


def test_at_capacity_is_held_to_its_promise():
    class Stuck(newest()):
        def at_capacity(self, capacity):
            return self

    class Forgotten(newest()):
        def at_capacity(self, capacity):
            Forgotten(capacity)

    assert checked_at_capacity(Stuck(4), 4) == Stuck(4)
    for policy in (Stuck(4), Forgotten(4)):
        with pytest.raises(ValueError, match="at_capacity: its result must be a policy that keeps"):
            LessConfig(tokens=5, policy=policy).policy_at(5)
    with pytest.raises(ValueError, match="does not say how to keep 5; override at_capacity"):
        LessConfig(tokens=5, policy=newest()(4)).policy_at(5)


def test_a_child_of_a_built_in_policy_stays_itself_at_another_capacity():
    @dataclass(frozen=True)
    class Wide(SinkRecent):
        width: int = 2

    assert Wide(4, 4, width=3).at_capacity(20) == Wide(4, 16, width=3)


# -- text --------------------------------------------------------------------------------------


def test_a_command_line_names_a_policy_or_writes_its_settings():
    Newest = newest()
    assert policy_from_text("--policy", "h2o").at_capacity(8) == H2O(4, 4)
    assert policy_from_text("--policy", "sinks").at_capacity(8) == SinkRecent(4, 4)
    assert policy_from_text("--policy", '{"name": "Newest", "size": 3}') == Newest(3)
    assert policy_from_text("--policy", {"name": "Newest", "size": 3}) == Newest(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lru", "--policy must be one of h2o, sinks, trained, or .* got 'lru'"),
        ("[1]", "--policy must be one of"),
        (3, "--policy must be one of"),
        ("{name: H2O}", "--policy: {name: H2O} is not JSON"),
        ('{"heavy": 1}', "--policy: name must be one of .*, got None"),
        ('{"name": "H2O", "size": 1}', "--policy: bad settings for H2O: {'size': 1}: .*'size'"),
        ('{"name": "H2O", "heavy": -1, "recent": 1}', "H2O: heavy must be 0 or more"),
    ],
)
def test_text_that_names_no_policy_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        policy_from_text("--policy", given, ["trained"])


# -- files and modules -------------------------------------------------------------------------


def test_a_file_is_run_once_and_its_policies_are_known(file):
    module = import_policies("--import", str(file))
    policy = policy_from_dict(WRITTEN)
    assert type(policy) is module.SmallestKeys
    assert import_policies("--import", str(file)) is module
    assert policy_from_dict(WRITTEN) == policy


def test_two_files_of_one_name_are_two_modules(file, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / file.name
    other.write_text(EXAMPLE.replace("SmallestKeys", "LargestKeys"))
    for path in (file, other):
        import_policies("--import", str(path))
    assert policy_from_dict({**WRITTEN, "name": "LargestKeys"}).capacity == 64
    assert policy_from_dict(WRITTEN).capacity == 64


def test_a_module_is_found_on_pythons_path(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.delitem(sys.modules, "smallest_keys", raising=False)
    for _ in range(2):
        import_policies("--import", "smallest_keys")
    assert policy_from_dict(WRITTEN).capacity == 64
    del sys.modules["smallest_keys"]


def test_a_package_may_define_its_policies_in_modules_below_it(tmp_path, monkeypatch):
    package = tmp_path / "package_of_policies"
    package.mkdir()
    (package / "__init__.py").write_text("from package_of_policies import below")
    (package / "below.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        import_policies("--import", "package_of_policies")
    assert policy_from_dict(WRITTEN).capacity == 64
    for name in ("package_of_policies", "package_of_policies.below"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.py", None, "--import nowhere.py: there is no such file"),
        ("some/nowhere", None, "--import some/nowhere: there is no such file"),
        ("./policy.txt", "", "a file of policies must end in .py"),
        ("no_module_here", None, "Python's path has no such module; a file is named with"),
        ("json.nowhere", None, "Python's path has no such module"),
        ("json", None, "--import json: it defines no policy"),
        ("less.policies", None, "--import less.policies: it defines no policy"),
        ("empty.py", "from less import H2O", "--import empty.py: it defines no policy"),
        ("broken.py", "import nowhere_at_all", "failed: ModuleNotFoundError: .*nowhere_at_all"),
        ("syntax.py", "def", "importing it failed: SyntaxError"),
        ("script.py", "raise SystemExit(0)", "importing it failed: SystemExit: 0"),
        ("shadow.py", EXAMPLE.replace("SmallestKeys", "H2O"), "H2O is the name of a built-in"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    for _ in range(2):  # a failure leaves no half of a module behind
        with pytest.raises(ValueError, match=message):
            import_policies("--import", name)


# -- entry points ------------------------------------------------------------------------------


@pytest.fixture
def installed(file, monkeypatch):
    """Installs entry points whose modules lie beside the file; lists the names asked for."""
    monkeypatch.syspath_prepend(file.parent)
    asked = []

    def install(*values, name="SmallestKeys"):
        points = [importlib.metadata.EntryPoint(name, value, "less.policies") for value in values]

        def entry_points(**wanted):
            asked.append(wanted["name"])
            return importlib.metadata.EntryPoints(points).select(**wanted)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        return asked

    yield install
    for name in ("smallest_keys", "broken"):
        sys.modules.pop(name, None)


def test_an_entry_point_is_loaded_when_its_name_is_asked_for_and_not_before(installed):
    asked = installed("smallest_keys:SmallestKeys")
    assert policy_from_dict(H2O(1, 1).to_dict()) == H2O(1, 1)
    assert asked == []
    assert "smallest_keys" not in sys.modules
    assert policy_from_dict(WRITTEN).capacity == 64
    assert policy_from_dict(WRITTEN).capacity == 64
    assert asked == ["SmallestKeys"]


def test_an_entry_point_of_another_name_is_not_loaded(installed):
    installed("smallest_keys:SmallestKeys")
    with pytest.raises(ValueError, match="name must be one of .*, got 'LRU'"):
        policy_from_dict({"name": "LRU"})
    assert "smallest_keys" not in sys.modules


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["broken"], "entry point SmallestKeys = broken of .* fails: ZeroDivisionError"),
        (["nowhere_at_all"], "fails: ModuleNotFoundError"),
        (["json"], "entry point SmallestKeys = json .* defines no policy of this name"),
        (["smallest_keys", "json"], r"several entry points .*\['json', 'smallest_keys'\]"),
    ],
)
def test_an_entry_point_that_gives_no_policy_is_refused_by_name(installed, file, values, message):
    (file.parent / "broken.py").write_text("1 / 0")
    installed(*values)
    with pytest.raises(ValueError, match=message):
        policy_from_dict(WRITTEN)


def test_one_entry_point_seen_twice_is_one(installed):
    installed("smallest_keys", "smallest_keys")
    assert policy_from_dict(WRITTEN).capacity == 64


# -- the whole way -----------------------------------------------------------------------------


def less_kv(*arguments, cwd):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "less.cli", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_sidekick_trained_under_a_policy_in_a_file_is_evaluated_in_another_process(file, capsys):
    pytest.importorskip("transformers")
    from less.cli import main
    from less.evaluate import report
    from tests.tiny_model import TEXT, save_tiny

    root = file.parent
    save_tiny(root / "model")
    (root / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(40)))
    common = ["--model", root / "model", "--text", root / "text.txt", "--length", 48]
    train = [
        "--import", file, "train", *common, "--chunks", 4, "--out", root / "sidekick",
        "--policy", json.dumps(WRITTEN), "--budget", "10,16", "--steps", 2, "--rows", 8,
        "--rank", 4, "--hidden", 8, "--threads", 1,
    ]  # fmt: skip
    assert main(list(map(str, train))) == 0, capsys.readouterr().err
    sidekick = Sidekick.from_pretrained(root / "sidekick")
    assert sidekick.config["policies"] == [{**WRITTEN, "budget": b} for b in (10, 16)]

    evaluate = [
        "evaluate", *common, "--chunks", 1, "--probes", 0, "--budgets", 16, "--no-speed",
        "--sidekick", root / "sidekick", "--out", root / "out", "--threads", 1,
    ]  # fmt: skip
    refused = less_kv(*evaluate, cwd=root)
    assert refused.returncode == 2
    assert "got 'SmallestKeys'. Import the module" in refused.stderr
    assert not (root / "out").exists()

    done = less_kv("--import", file.name, *evaluate, cwd=root)
    assert done.returncode == 0, done.stderr
    _, rows = report.read_json_lines((root / "out" / "results.jsonl").read_text())
    names = [row.method for row in rows]
    assert "LESS" in names
    assert "SmallestKeys, equal bytes" in names


def test_the_option_comes_before_the_command_and_may_be_given_again(file, capsys):
    from less.cli import main

    assert main(["--import", "nowhere.py", "info"]) == 2
    assert "less-kv info: error: --import nowhere.py: there is no such file" in (
        capsys.readouterr().err
    )
    assert main(["--import", str(file), "--import=nowhere.py", "info"]) == 2
    assert "nowhere.py: there is no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["info", "--import", str(file)])
    assert "unrecognized arguments: --import" in capsys.readouterr().err
    assert main(["--import", str(file), "info"]) == 0
    assert policy_from_dict(WRITTEN).capacity == 64


def test_threads_sleep_while_they_wait_after_an_import_too(monkeypatch):
    from less import cli
    from less.cli import threads

    waits = []
    monkeypatch.setattr(threads, "wait_passively", lambda: waits.append(True))
    monkeypatch.setattr(cli, "main", lambda: 0)
    for arguments, wanted in (
        (["--import", "train", "info"], False),
        (["--import", "mine.py", "train"], True),
        (["train"], True),
    ):
        waits.clear()
        monkeypatch.setattr(sys, "argv", ["less-kv", *arguments])
        cli.command()
        assert bool(waits) is wanted
