"""Account for GPU-hours: ledgers of runs, totals from sacct, budget, campaign, calibration."""
