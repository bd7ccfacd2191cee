#!/usr/bin/env bash
# pytest 9.2 and pytest-xdist 3.8: `--dist loadgroup` runs as if no test had a group, and nothing says so.
#
# Versions:  pytest-xdist 3.8.0 with pytest 9.1.1 and with pytest 9.2.0, which pip takes together.
# Expected:  tests with one xdist_group marker run in one process, one after another, as documented.
# Behaviour: with 9.2.0 each test goes to whichever process is free. xdist appends "@GROUP" to a private attribute of
#            the test, from which pytest made its node id until 9.1; 9.2 makes the id from something else.
# Why it matters: groups are there for tests that share something (a card, a port, a module's costly fixture). Such a
#            suite of a training program goes on green, while two tests share one GPU or each makes the fixture anew.
# Output: processes that ran the ten tests of one group, of two
OUTPUT='pytest 9.1.1: 1
pytest 9.2.0: 2'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_group.py" <<'EOP'
import os
import pathlib
import time

import pytest

pytestmark = pytest.mark.xdist_group("card")


@pytest.mark.parametrize("number", range(10))
def test_one(number):
    pathlib.Path(os.environ["SEEN"], os.environ["PYTEST_XDIST_WORKER"]).touch()
    time.sleep(0.3)
EOP
python3 -m venv "$folder/venv"
found=$(for version in 9.1.1 9.2.0; do
    "$folder/venv/bin/pip" install --quiet "pytest==$version" pytest-xdist==3.8.0
    mkdir "$folder/$version"
    (cd "$folder" &&
        SEEN="$folder/$version" venv/bin/python -m pytest -q -n 2 --dist loadgroup test_group.py >/dev/null)
    echo "pytest $version: $(find "$folder/$version" -type f | wc -l)"
done)
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "they behave otherwise now" >&2; exit 1; }
