# SPDX-License-Identifier: Apache-2.0
"""Structured pruning: groups are scored, indices chosen, the function made smaller, repaired."""
