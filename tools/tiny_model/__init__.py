# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The parts of ``tools/train_tiny_model.py``: corpus, tokenizer, model, optimizer, training, export."""
