"""PEFT's own tests of LoRA, run under stock PEFT and under patch_peft: no test may fail that did not before.

    python tests/peft/run_peft_suite.py PATH_TO_A_PEFT_CHECKOUT [--workers N] [--select EXPRESSION]

The checkout's tests run against the PEFT that is installed, so it should be of that version. They need
diffusers and attrs too. The exit status is 1 where a test fails under patch_peft alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PATCH = "LORA_KERNELS_PEFT_SUITE_PATCH"
COUNTS = "LORA_KERNELS_PEFT_SUITE_COUNTS"
# Parts of names of tests that may fail under patch_peft alone, and why.
ROUNDING = {
    "fsdp_wrapped_learnable_bias[bias_peft_method_only-Vanilla MLP 1 LoRA with lora_b bias": (
        "An FSDP1 unit that mixes frozen and trained parameters, where PEFT's forward runs, is compared with "
        "a fused model to an absolute 1e-8. The output is the logarithm of a number near 1, of ulp 1.2e-7."
    ),
}
calls = 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a checkout of huggingface/peft")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--select", default="", help="an expression for pytest's -k, within the LoRA tests")
    options = parser.parse_args()
    suite = options.checkout.resolve() / "tests" / "test_custom_models.py"
    if not suite.is_file():
        parser.error(f"{options.checkout} has no tests/test_custom_models.py: it must be a checkout of PEFT")

    stock = run(suite, options, patch=False)
    fused = run(suite, options, patch=True)
    failing, failing_fused = ({name for name, failed in run.items() if failed} for run in (stock, fused))
    excused = {name for name in failing_fused - failing if any(part in name for part in ROUNDING)}
    regressions = failing_fused - failing - excused
    show("fail in both", failing & failing_fused)
    show("fail under stock PEFT alone", failing - failing_fused)
    show("fail under patch_peft alone by a rounding that ROUNDING explains", excused)
    show("fail under patch_peft alone", regressions)
    show("ran in one of the two alone", stock.keys() ^ fused.keys())
    return 1 if regressions or stock.keys() != fused.keys() else 0


def show(title: str, names: Iterable[str]) -> None:
    found = sorted(names)
    print(f"{len(found)} {title}", *(f"  {name}" for name in found), sep="\n", flush=True)


def run(suite: Path, options: argparse.Namespace, patch: bool) -> dict[str, bool]:
    """Whether each test failed, by name."""
    with tempfile.TemporaryDirectory() as folder:
        here, package = Path(__file__).parent, Path(__file__).parents[2]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(here), str(package), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            PATCH: str(int(patch)),
            COUNTS: folder,
        }
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-p",
            Path(__file__).stem,
            "-o",
            "addopts=",
        ]
        command += [
            "-o",
            "filterwarnings=",
            "--tb=no",
            "-rN",
            f"--junitxml={report}",
            "-n",
            str(options.workers),
        ]
        command += ["-p", "no:warnings", "-k", options.select, str(suite)]
        subprocess.run(command, cwd=suite.parents[1], env=environment, check=False)
        if not report.is_file():
            raise SystemExit("pytest wrote no report")
        fused_calls = sum(int(path.read_text()) for path in Path(folder).glob("*.count"))
        results = {
            f"{case.get('classname')}::{case.get('name')}": any(
                child.tag in ("failure", "error") for child in case
            )
            for case in ElementTree.parse(report).iter("testcase")
        }
    failed = sum(results.values())
    title = "under patch_peft" if patch else "under stock PEFT"
    print(f"{title}: {len(results)} tests, {failed} failed, {fused_calls} fused forwards", flush=True)
    return results


# From here on: the plugin that runs inside pytest.


def pytest_configure(config: Any) -> None:
    if PATCH not in os.environ:
        return
    from tests import testing_utils

    # It turns the offline mode off again.
    testing_utils.hub_online_once = no_hub
    if os.environ[PATCH] == "1":
        import lora_kernels
        from lora_kernels.integrations import peft_layer

        handle = lora_kernels.patch_peft()
        assert handle.active, handle
        fused_forward = peft_layer.fused_forward

        def counted(*arguments: Any) -> Any:
            global calls
            calls += 1
            return fused_forward(*arguments)

        peft_layer.fused_forward = counted


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    selected = [item for item in items if is_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_lora(item)])
    items[:] = selected


def pytest_sessionfinish(session: Any) -> None:
    if COUNTS in os.environ:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        (Path(os.environ[COUNTS]) / f"{worker}.count").write_text(str(calls))


def is_lora(item: Any) -> bool:
    """A test that is parametrized by configurations is one of LoRA's by its class; any other by its name."""
    from peft import LoraConfig, PeftConfig

    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    configs = {p for p in parameters if isinstance(p, type) and issubclass(p, PeftConfig)}
    return LoraConfig in configs if configs else "lora" in item.nodeid.lower()


@contextlib.contextmanager
def no_hub(model_id: str) -> Iterator[None]:
    yield


if __name__ == "__main__":
    sys.exit(main())
