# Sourced by the scripts beside it: enter the checkout, and make the environment $venv with hoptim in it if there is none,
# or if pyproject.toml has changed since. .venv has the newest versions that hoptim declares, .venv-oldest the lowest.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${venv:-.venv}
python=$venv/bin/python
if [ ! -f $venv/.installed ] || [ pyproject.toml -nt $venv/.installed ]; then
  if [ $venv = .venv-oldest ]; then
    [ -x $python ] || "${PYTHON:-python3.10}" -m venv $venv
    $python -m pip install --quiet --upgrade pip uv
    $python -m uv pip install --quiet --python $python --upgrade --resolution lowest-direct --editable '.[dev]'
  else
    [ -x $python ] || "${PYTHON:-python3}" -m venv $venv
    $python -m pip install --quiet --upgrade pip
    $python -m pip install --quiet --editable '.[dev]'
  fi
  touch $venv/.installed
fi
