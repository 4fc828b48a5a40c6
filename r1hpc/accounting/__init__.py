"""Account for GPU-hours: ledger, budget, campaign, forecast, calibration."""
