"""The quantizing rail: calibration -> Hessians -> aggregate -> solve -> packed checkpoint."""
