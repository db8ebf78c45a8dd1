"""Commands that plugins add to `sca`: listed from metadata, imported when used, and harmless when broken."""

import sys

import pytest
import sca_registry

APP = """
import typer

app = typer.Typer(help="Greetings.", rich_markup_mode=None)

@app.callback()
def group(): ...

@app.command()
def hello(name: str): print(f"hello, {name}")
"""
FUNCTION = "def greet(name: str, twice: bool = False): print(*[f'hi, {name}'] * (1 + twice))"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(name, entry_points, **modules)` makes a distribution with commands."""
    before, folder = set(sys.modules), tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def call(name, entry_points, **modules):
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: Says {name}.\n")
        (info / "entry_points.txt").write_text(f"[sca_commands]\n{entry_points}\n")
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
        sca_registry.refresh_plugins()

    yield call
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    monkeypatch.undo()
    sca_registry.refresh_plugins()


def test_help_lists_commands_of_plugins_without_importing_them(shell, install):
    install("greeter", "greetings = greeter_app:app", greeter_app="raise SystemExit('imported')")
    listed = shell("--help").out
    assert "greetings  Says greeter." in listed
    assert "bench      Benchmark combinations" in listed
    assert "greeter_app" not in sys.modules


def test_plugin_command_may_be_an_app_or_a_function(shell, install):
    install("greeter", "greetings = greeter_app:app\ngreet = greeter_app:greet", greeter_app=APP + FUNCTION)
    assert shell("greetings", "hello", "you").out == "hello, you\n"
    assert "install-completion" not in shell("greetings", "--help").out
    assert shell("greet", "you", "--twice").out == "hi, you hi, you\n"
    usage = shell("greet")
    assert (usage.status, usage.err[-1]) == (2, "sca: Missing argument 'name'. See: sca greet --help")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('out of tea')", "RuntimeError: out of tea"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import nothing_here", "ModuleNotFoundError: No module named 'nothing_here'"),
        ("app = 3", "TypeError: int is not a typer app or a function"),
        ("", "AttributeError: module 'greeter_app' has no attribute 'app'"),
    ],
)
def test_broken_plugin_command_is_one_line_and_harms_no_other(shell, install, text, reason):
    install("greeter", "greetings = greeter_app:app", greeter_app=text)
    failed = shell("greetings")
    assert failed.status == 2
    assert failed.err == [f"sca: the command 'greetings' of greeter 1.0 cannot be loaded: {reason}; update it"]
    assert shell("list", "mixer").status == 0
    assert "greetings" in shell("--help").out


def test_clash_of_plugin_commands_is_refused_and_names_both(shell, install):
    install("one", "greetings = one_app:app", one_app=APP)
    install("two", "greetings = two_app:app", two_app=APP)
    refused = shell("greetings", "hello", "you")
    assert refused.status == 2
    assert "'greetings' is provided by" in refused.err[0]
    assert all(name in refused.err[0] for name in ("one 1.0", "two 1.0"))


def test_plugin_command_does_not_replace_one_of_sca(shell, install):
    install("thief", "caption = thief_app:app", thief_app="raise SystemExit('imported')")
    assert "Usage: sca caption" in shell("caption", "--help").out
    from sca.cli.plugins import _find_command_problems

    assert _find_command_problems() == ["thief 1.0: `sca` has a command 'caption' itself; rename the plugin's"]


def test_mistyped_plugin_command_is_suggested(shell, install):
    install("greeter", "greetings = greeter_app:app", greeter_app=APP)
    assert "Did you mean 'greetings'" in shell("greetngs").err[0]
    assert "Did you mean 'bench'" in shell("bnech").err[0]
