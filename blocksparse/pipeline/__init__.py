"""The main job: dense training, gradual pruning, export, verification and the closing report.

`entry.run_job` and `job.run` are all of it; `export_job.run` is the export by itself. `scan_job`
and `allocate_job` are the other tasks of train.py: which layers are easy to prune, and how much of
each fits a budget of time. `source` finds what is exported, `stages` trains, `measure` counts and
times, `folders` knows what lies where, `progress` and `console` are what a person sees.
"""
