"""Continual next-token pre-training of the small policy that comes with rpt_jax: the baseline of configs/rpt_tiny.py.

It starts from the same policy and learns the same training documents, without reasoning.

Command   bash launch/local.sh --config=configs/ntp_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      31 minutes on a shared machine with a load of 13 to 23 (28 November 2026); 3.4 minutes of processor time
Results   with the earlier base policy, of version 0.1.0; one seed, held-out positions above 0.5 nats: direct 39.1 % before,
          50.9 % after; by reasoning 31.8 %, 37.1 %
          (rpt_jax.evaluate --config=configs/rpt_tiny.py --suite=next_token --config.evaluation.positions=320
          --config.evaluation.samples=4; intervals of about ± 6 and ± 4 points)
"""

from typing import Any

import rpt_tiny


def get_config() -> Any:
    config = rpt_tiny.get_config()
    config.task = "pretrain"
    config.pretrain.trace_weight = 0.0
    config.pretrain.windows_per_step = 16
    return config
