# SPDX-License-Identifier: MIT
"""What train.py stands on, and no learner has to read: flags, files, engines, the report."""
