"""What hours are planned, spent and left: ledger, budget, campaign, forecast, calibration."""
