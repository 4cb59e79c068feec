"""Fuzzes what decodes foreign bytes: `targets/` says what, `guard.py` what counts as a finding, `engines.py` how."""
