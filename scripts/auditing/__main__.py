"""`scripts/audit`: exit code 1 when a check complains. What could not be checked is said, never counted as passed."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from typing import Final

from auditing.checks import ROOT, allowed_by_us, damaged, flawed, needed, pins, unpinned

ONLINE: Final = ("pip_audit", "-r", "constraints.txt", "--no-deps", "--disable-pip", "--progress-spinner", "off")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/audit",
        description="Without a network: every dependency is pinned and installed as pinned, no file of it was changed "
        "since, and none is in our short list of known flaws. With one, and `pip install pip-audit`: all published "
        "advisories. Example: scripts/audit --online",
    )
    parser.add_argument("--online", action="store_true", help="fail when the advisories cannot be asked for")
    parser.add_argument("--no-files", action="store_true", help="do not read every installed file")
    options = parser.parse_args()
    needs, pinned = needed(), pins()
    complaints = [*unpinned(needs, pinned), *flawed(needs), *flawed(pinned), *allowed_by_us()]
    if not options.no_files:
        complaints += damaged([name for name, version in needs.items() if version])
    for complaint in dict.fromkeys(complaints):
        print(complaint)
    print(f"{len(needs)} dependencies, {len(set(complaints))} complaints")
    published = ask_published()
    raise SystemExit(bool(complaints) or published is False or (options.online and published is None))


def ask_published() -> bool | None:
    """Whether no published advisory names what is pinned; None when that could not be found out."""
    if find_spec("pip_audit") is None:
        print("published advisories: not asked, pip-audit is not installed; run: pip install pip-audit")
        return None
    done = subprocess.run([sys.executable, "-m", *ONLINE], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print("published advisories: none")
        return True
    if "vulnerabilit" in done.stderr.lower() and "found" in done.stderr.lower():
        print(done.stdout)
        return False
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    print(f"published advisories: not asked, pip-audit failed: {last}")
    return None


if __name__ == "__main__":
    main()
