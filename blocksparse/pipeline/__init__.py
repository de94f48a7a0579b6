"""The main job: dense training, gradual pruning, export, verification and the closing report.

`job.run_job` is all of it; `stages` trains, `measure` counts and times, `folders` knows what lies
where, `progress` and `console` are what a person sees.
"""
