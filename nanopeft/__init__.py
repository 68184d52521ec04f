# SPDX-License-Identifier: MIT
"""nanopeft: parameter-efficient fine-tuning, one file per technique. Nothing is imported here: open the file."""

__version__ = "0.1.0"
