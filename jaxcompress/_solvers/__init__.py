# SPDX-License-Identifier: Apache-2.0
"""Problems of one layer: arrays go in, arrays come out. No sites, no recipes, no models."""
