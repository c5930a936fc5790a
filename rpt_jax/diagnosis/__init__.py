"""What is wrong with a run: rules that read its metrics and rollouts and return findings.

A rule is one decorated function, see `rpt_jax.diagnosis.rule`. `rpt_jax.diagnosis.examination` applies all of them to a run.
"""
