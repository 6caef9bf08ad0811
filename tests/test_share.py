"""A run to a Hub that stands on this machine, and back from there."""
import pytest

from hub import python, running_hub
from mistral_nb.demo import demo_settings, make_demo
from mistral_nb.train.loop import Trainer


@pytest.fixture
def hub():
    with running_hub() as server: yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("share")
    Trainer(demo_settings(make_demo(home), home / "run"), max_steps=4, eval_freq=2).fit()
    return home


def test_push_and_back(run, hub, shell_env, tmp_path):
    "A run goes out privately, with its page and its curve, and chats from its name"
    code = f"from mistral_nb import push; print(push({str(run / 'run')!r}, 'me/demo'))"
    done = python(code, hub, shell_env, tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.state["files"]
    assert hub.state["private"] is True and "to me/demo, private" in done.stdout
    wanted = "README.md adapter_config.json adapter_model.safetensors certificate.json loss.png"
    assert set(wanted.split()) <= set(files)
    page = files["README.md"].decode()
    assert page.startswith("---\nbase_model: ") and "## Certificate" in page and "demo" in page
    for name, content in files.items(): assert str(run).encode() not in content, name
    code = (
        "from mistral_nb import load_tuned\n"
        f"a = load_tuned({str(run / 'model')!r}, 'me/demo')\n"
        f"b = load_tuned({str(run / 'model')!r}, {str(run / 'run/checkpoints/checkpoint_000004')!r})\n"
        "from mistral_nb.model.lora import lora_layers\n"
        "pairs = zip(lora_layers(a).values(), lora_layers(b).values())\n"
        "print(all((x.delta() - y.delta()).abs().max() < 1e-6 for x, y in pairs))"
    )
    done = python(code, hub, shell_env, tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_refused(run, hub, shell_env, tmp_path):
    "Without a login, and for a repository of others, the error says what to do"
    code = f"from mistral_nb import push; push({str(run / 'run')!r}, %r)"
    done = python(code % "me/demo", hub, shell_env, tmp_path, token="")
    assert done.returncode == 1 and "notebook_login()" in done.stderr
    done = python(code % "gated/demo", hub, shell_env, tmp_path)
    assert done.returncode == 1 and "gated/demo" in done.stderr.splitlines()[-1]
    assert not hub.state["files"]
