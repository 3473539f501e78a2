# Sourced by the scripts beside it: enter the checkout, and make .venv with hoptim in it if there is none, or if
# pyproject.toml has changed since.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if [ ! -f .venv/.installed ] || [ pyproject.toml -nt .venv/.installed ]; then
  [ -x $python ] || "${PYTHON:-python3}" -m venv .venv
  $python -m pip install --quiet --upgrade pip
  $python -m pip install --quiet --editable '.[dev]'
  touch .venv/.installed
fi
