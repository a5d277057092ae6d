"""What a start leaves out: modules that nobody comes to before the first step, and files that say what is known."""

import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from trainer.base import lean, listing
from trainer.base.later import Later, waiting
from trainer.model.unread import NothingDrawn

ROOT = Path(__file__).parent.parent
# None of them is loaded at the first step. codecarbon has a thread of its own.
NOT_YET = {
    "datasets", "deepspeed", "evaluate", "matplotlib", "peft", "scipy.optimize", "sklearn",
    "sympy", "torch._dynamo.config", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor", "transformers.models.deberta_v2.modeling_deberta_v2",
}  # fmt: skip
TO_THE_FIRST_STEP = """
import json, os, sys
class Arm:
    def find_spec(self, name, path=None, target=None):
        if name == "trainer.step.plain":
            sys.meta_path.remove(self)
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(lambda *_: print(json.dumps([*sys.modules]), flush=True) or os._exit(0))
sys.meta_path.insert(0, Arm())
import crossrank
crossrank.main()
"""
DORMANT = """
import os, sys
from trainer.base import dynamo
dynamo.postpone()
import torch
if (child := os.fork()) == 0:
    assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
    assert "torch._dynamo.config" not in sys.modules
    assert torch._dynamo.utils.detect_fake_mode([]) is None  # as torch.fx does
    assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
noted = lambda x: x
assert torch.compiler.allow_in_graph(noted) is noted
weight = torch.ones(2, requires_grad=True)
optimizer = torch.optim.AdamW([weight], fused=True)
apart = torch.compiler.disable(lambda x: x + 1)
(apart(weight)).sum().backward()
optimizer.step()
assert weight[0] < 1 and "torch._dynamo.config" not in sys.modules
sleeping = sys.modules["torch._dynamo"]
import torch._dynamo.utils  # a part of it
assert sys.modules["torch._dynamo"] is torch._dynamo is not sleeping and torch._dynamo.config
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert id(noted) in torch._dynamo.trace_rules._allowed_callable_ids.function_ids
seen = []
def backend(graph, inputs):
    seen.append(graph)
    return graph
compiled = torch.compile(lambda x: apart(x * 2) * 3, backend=backend)
assert torch.equal(compiled(torch.ones(1)), torch.tensor([9.0])) and len(seen) == 2  # broken at what is disabled
optimizer.step()
"""


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_first_step_needs_little(builtin_model, tmp_path):
    fields = {
        "recipe": "demo",
        "model_name_or_path": builtin_model,
        "init": "pretrained",
        "output_dir": tmp_path / "run",
    }
    out = python("-c", TO_THE_FIRST_STEP, "train", *(f"--{name}={value}" for name, value in fields.items()))
    loaded = json.loads(out.splitlines()[-1])
    assert "trainer.loop" in loaded
    assert not NOT_YET & {*loaded}


def test_libraries_find_what_waited(tmp_path):
    """peft says torch.distributed.tensor without an import: transformers has imported it."""
    fields = {"recipe": "demo", "max_train_samples": 64, "max_steps": 1, "lora_r": 2, "track_emissions": "false",
              "max_eval_samples": 10, "max_test_samples": 10, "write_report": "false",
              "output_dir": tmp_path / "run"}  # fmt: skip
    python("-m", "crossrank", "train", *(f"--{name}={value}" for name, value in fields.items()))
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_dynamo_sleeps_until_something_is_compiled():
    python("-c", DORMANT)


def test_imports_as_python_has_them(monkeypatch):
    """Where the user says so, and for code that a model brings."""
    before = [*sys.meta_path]
    monkeypatch.setenv("CROSSRANK_LEAN_IMPORTS", "0")
    with lean.imports():
        assert sys.meta_path == before
    assert not lean._own.is_set()
    monkeypatch.setattr(lean, "_own", threading.Event())
    lean._own.set()
    with lean.further():
        assert len(sys.meta_path) == len(before) + 1
    with lean.further(foreign=True):
        assert sys.meta_path == before


@pytest.fixture
def heavy(tmp_path, monkeypatch):
    """A package `heavy` with a module `heavy.inner`."""
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("__version__ = '3'\nclass Thing: size = 1\n")
    (tmp_path / "heavy" / "inner.py").write_text("def double(x): return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("heavy", "heavy.inner"):
        sys.modules.pop(name, None)


def test_a_module_waits_until_it_is_used(heavy):
    with waiting("heavy"):
        import heavy as held
        from heavy import Thing
        from heavy.inner import double
    assert isinstance(Thing, Later)
    assert not {"heavy", "heavy.inner"} & {*sys.modules}
    assert not isinstance(3, Thing | None)
    assert not isinstance(3, Thing)
    assert "heavy" not in sys.modules  # nobody can have made one
    assert double(4) == 8
    assert held.__version__ == "3"
    import heavy

    assert isinstance(heavy.Thing(), Thing)
    assert issubclass(heavy.Thing, Thing)
    assert isinstance(Thing(), heavy.Thing)
    assert Thing.size == 1


def test_a_module_that_is_used_at_once_is_loaded_at_once(heavy):
    with waiting("heavy"):
        from heavy import Thing

        class Mine(Thing):
            pass

        import heavy as real
    assert Mine.__bases__ == (real.Thing,)
    assert sys.modules["heavy"] is real


def test_what_is_not_installed_does_not_wait():
    with waiting("no_such_package"), pytest.raises(ModuleNotFoundError):
        import no_such_package  # noqa: F401


def test_the_list_of_models_is_kept(tmp_path, monkeypatch):
    from transformers.utils import import_utils

    monkeypatch.setenv("CROSSRANK_CACHE", str(tmp_path))
    models = Path(import_utils.__file__).parent.parent / "models"
    real = getattr(import_utils.define_import_structure, "__wrapped__", import_utils.define_import_structure)
    truth = real(str(models)), real(models, prefix="models")

    def reads(define) -> int:
        """How often one process reads the models, which is to come to the same."""
        asked = []
        module = types.SimpleNamespace(
            __file__=import_utils.__file__, define_import_structure=lambda *a: asked.append(a) or define(*a)
        )
        listing.keep(module)
        assert module.define_import_structure(str(models / "__init__.py")) == truth[0]
        assert module.define_import_structure(models, prefix="models") == truth[1]
        return len(asked)

    assert reads(real) == 1
    assert reads(real) == 0
    (file,) = tmp_path.iterdir()
    file.write_text("[[1")
    assert reads(real) == 1
    monkeypatch.setattr(listing, "_place", lambda models: None)  # of a checkout nothing is known
    assert reads(real) == 1
    other = types.SimpleNamespace(__file__=import_utils.__file__)
    listing.keep(other)  # a version that has no such function
    assert not hasattr(other, "define_import_structure")


def test_patterns_are_compiled_when_they_are_used():
    module = types.SimpleNamespace()
    lean.compile_later(module)
    pattern = module.re.compile("(?P<g0>a+)")
    assert "compiled" not in vars(pattern)
    assert pattern.search("baa").group() == "aa"
    assert pattern.groupindex["g0"] == 1
    assert module.re.sub("a", "b", "a") == "b"


def test_a_shape_has_no_numbers(builtin_model):
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        plain = torch.nn.Embedding(7, 5).weight
    with NothingDrawn(), torch.device("meta"):
        made = torch.nn.Embedding(7, 5).weight
        numbers = torch.arange(9)
        kinds = [torch.arange(9, dtype=kind, device="meta").dtype for kind in (None, torch.float32)]
    assert (made.shape, made.dtype, made.device) == (plain.shape, plain.dtype, plain.device)
    assert (numbers.shape, numbers.dtype) == ((9,), torch.int64)
    assert kinds == [torch.int64, torch.float32]
    with NothingDrawn():
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert torch.nn.init.normal_(torch.zeros(9)).abs().sum() > 0
        like = torch.empty_like(plain, device="cpu")
        loaded = AutoModelForSequenceClassification.from_pretrained(builtin_model)
    assert (like.shape, like.device.type) == (plain.shape, "cpu")
    assert not like.requires_grad
    truth = AutoModelForSequenceClassification.from_pretrained(builtin_model).state_dict()
    assert loaded.state_dict().keys() == truth.keys()
    assert all(torch.equal(loaded.state_dict()[name], truth[name]) for name in truth)
