"""What scores are made of: metrics, resamples and their intervals, groups, calibration, ranks, paired differences."""
