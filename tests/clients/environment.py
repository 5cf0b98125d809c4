"""Environments for projects that are built on Lightning: `python tests/clients/environment.py darts` makes one.

Each sees the packages of the interpreter that makes it, PyTorch and this package among them, and has the project and
what else that needs for itself.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Environments outlive a clone of the repository where this names another folder.
FOLDER = Path(os.environ.get("LIGHTNING_QUANT_CLIENTS", REPOSITORY / ".clients"))
_CONSTRAINTS = REPOSITORY / "constraints.txt"
REQUIREMENTS = {
    "darts": ["darts==0.48.1"],
    "forecasting": ["pytorch-forecasting==1.8.0"],
    "neuralforecast": ["neuralforecast==3.3.0"],
    "gluonts": ["gluonts[torch]==0.17.0", "pandas==2.3.3"],
    "chemprop": ["chemprop==2.3.1"],
    "deeptab": ["deeptab==2.1.0"],
    "geometric": ["torch-geometric==2.8.1"],
    "mlcolvar": ["mlcolvar==1.2.2"],
    "scvi": ["scvi-tools==1.4.2"],
    # Its own requirements want an older torchmetrics.
    "tabular": ["pandas<3", "omegaconf", "scikit-base", "scipy", "einops", "--no-deps", "pytorch-tabular==1.2.0"],
}
"""Client to what pip installs for it, in two steps where something comes without its requirements."""


def python_of(client: str) -> Path:
    """Return the interpreter of a client's environment."""
    return FOLDER / client / "bin" / "python"


def is_made(client: str) -> bool:
    """Tell whether an environment was made for what the client requires now."""
    marker = FOLDER / client / "requirements"
    return marker.is_file() and marker.read_text() == _wanted(client)


def make(client: str) -> None:
    """Make a client's environment, unless it is there, and let it see the packages of this interpreter."""
    folder = FOLDER / client
    there = is_made(client)
    if not there:
        venv.create(folder, with_pip=True, clear=True)
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    if there:
        return
    command = [python_of(client), "-m", "pip", "install", "--quiet", "-c", str(_CONSTRAINTS)]
    wanted = REQUIREMENTS[client]
    split = wanted.index("--no-deps") if "--no-deps" in wanted else len(wanted)
    for packages in filter(None, (wanted[:split], wanted[split:])):
        subprocess.run([*command, *packages], check=True)
    (folder / "requirements").write_text(_wanted(client))


def _wanted(client: str) -> str:
    return "\n".join([*REQUIREMENTS[client], sys.version, _CONSTRAINTS.read_text()])


if __name__ == "__main__":
    for name in sys.argv[1:] or REQUIREMENTS:
        make(name)
