# SPDX-License-Identifier: Apache-2.0
CONFIG = "config.json"
