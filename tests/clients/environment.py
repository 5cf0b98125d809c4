"""Environments for projects that are built on Lightning: `python tests/clients/environment.py darts` makes one.

Each sees the packages of the interpreter that makes it, PyTorch and this package among them, and has the project and
what else that needs for itself.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / ".clients"
REQUIREMENTS = {
    "darts": ["darts==0.48.1"],
    "forecasting": ["pytorch-forecasting==1.8.0"],
    "neuralforecast": ["neuralforecast==3.3.0"],
    "gluonts": ["gluonts[torch]==0.17.0", "pandas==2.3.3"],
}
"""Client to what pip installs for it."""


def python_of(client: str) -> Path:
    """Return the interpreter of a client's environment."""
    return FOLDER / client / "bin" / "python"


def is_made(client: str) -> bool:
    """Tell whether an environment was made for what the client requires now."""
    marker = FOLDER / client / "requirements"
    return marker.is_file() and marker.read_text() == "\n".join(REQUIREMENTS[client])


def make(client: str) -> None:
    """Make a client's environment, unless it is there."""
    if is_made(client):
        return
    folder = FOLDER / client
    venv.create(folder, with_pip=True, clear=True)
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    constraints = str(REPOSITORY / "constraints.txt")
    command = [python_of(client), "-m", "pip", "install", "--quiet", "-c", constraints, *REQUIREMENTS[client]]
    subprocess.run(command, check=True)
    (folder / "requirements").write_text("\n".join(REQUIREMENTS[client]))


if __name__ == "__main__":
    for name in sys.argv[1:] or REQUIREMENTS:
        make(name)
