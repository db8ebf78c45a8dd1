"""Commands that plugins add to `sca`: listed from metadata, imported when used, and harmless when broken."""

import sys

import pytest
import sca_registry

PLUGIN_APP_SOURCE = """
import typer

app = typer.Typer(help="Greetings.", rich_markup_mode=None)

@app.callback()
def group(): ...

@app.command()
def hello(name: str): print(f"hello, {name}")
"""
PLUGIN_FUNCTION_SOURCE = "def greet(name: str, twice: bool = False): print(*[f'hi, {name}'] * (1 + twice))"


@pytest.fixture
def install_command_plugin(tmp_path, monkeypatch):
    """`install_command_plugin(name, entry_points, **modules)` installs a distribution with commands."""
    original_modules, site_folder = set(sys.modules), tmp_path / "site"
    site_folder.mkdir()
    monkeypatch.syspath_prepend(site_folder)

    def install_distribution(name, entry_points, **modules):
        dist_info = site_folder / f"{name}-1.0.dist-info"
        dist_info.mkdir()
        (dist_info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: Prints {name}.\n"
        )
        (dist_info / "entry_points.txt").write_text(f"[sca_commands]\n{entry_points}\n")
        for module, text in modules.items():
            (site_folder / f"{module}.py").write_text(text)
        sca_registry.refresh_plugins()

    yield install_distribution
    for name in set(sys.modules) - original_modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site_folder)):
            del sys.modules[name]
    monkeypatch.undo()
    sca_registry.refresh_plugins()


def test_help_lists_plugin_commands_without_importing_them(run_sca, install_command_plugin):
    install_command_plugin("greeter", "greetings = greeter_app:app", greeter_app="raise SystemExit('imported')")
    help_text = run_sca("--help").out
    assert "greetings  Prints greeter." in help_text
    assert "bench      Benchmark combinations" in help_text
    assert "greeter_app" not in sys.modules


def test_plugin_command_can_be_typer_app_or_function(run_sca, install_command_plugin):
    install_command_plugin(
        "greeter",
        "greetings = greeter_app:app\ngreet = greeter_app:greet",
        greeter_app=PLUGIN_APP_SOURCE + PLUGIN_FUNCTION_SOURCE,
    )
    assert run_sca("greetings", "hello", "you").out == "hello, you\n"
    assert "install-completion" not in run_sca("greetings", "--help").out
    assert run_sca("greet", "you", "--twice").out == "hi, you hi, you\n"
    result = run_sca("greet")
    assert (result.status, result.err[-1]) == (2, "sca: Missing argument 'name'. See: sca greet --help")


@pytest.mark.parametrize(
    ("module_source", "reason"),
    [
        ("raise RuntimeError('out of tea')", "RuntimeError: out of tea"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import nothing_here", "ModuleNotFoundError: No module named 'nothing_here'"),
        ("app = 3", "TypeError: int is not a typer app or a function"),
        ("", "AttributeError: module 'greeter_app' has no attribute 'app'"),
    ],
)
def test_broken_plugin_command_fails_in_one_line_without_affecting_others(
    run_sca, install_command_plugin, module_source, reason
):
    install_command_plugin("greeter", "greetings = greeter_app:app", greeter_app=module_source)
    result = run_sca("greetings")
    assert result.status == 2
    assert result.err == [f"sca: the command 'greetings' of greeter 1.0 cannot be loaded: {reason}; update it"]
    assert run_sca("list", "mixer").status == 0
    assert "greetings" in run_sca("--help").out


def test_plugin_command_offered_twice_is_rejected_naming_both_plugins(run_sca, install_command_plugin):
    install_command_plugin("one", "greetings = one_app:app", one_app=PLUGIN_APP_SOURCE)
    install_command_plugin("two", "greetings = two_app:app", two_app=PLUGIN_APP_SOURCE)
    result = run_sca("greetings", "hello", "you")
    assert result.status == 2
    assert "'greetings' is provided by" in result.err[0]
    assert all(name in result.err[0] for name in ("one 1.0", "two 1.0"))


def test_plugin_command_does_not_replace_builtin_command(run_sca, install_command_plugin):
    install_command_plugin("thief", "caption = thief_app:app", thief_app="raise SystemExit('imported')")
    assert "Usage: sca caption" in run_sca("caption", "--help").out
    from sca.cli.plugins import _find_command_problems

    assert _find_command_problems() == [
        "thief 1.0: the command 'caption' is built in; rename the command of the plugin"
    ]


def test_mistyped_command_suggests_plugin_and_builtin_commands(run_sca, install_command_plugin):
    install_command_plugin("greeter", "greetings = greeter_app:app", greeter_app=PLUGIN_APP_SOURCE)
    assert "Did you mean 'greetings'" in run_sca("greetngs").err[0]
    assert "Did you mean 'bench'" in run_sca("bnech").err[0]
