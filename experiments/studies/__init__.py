"""Many runs, and finished ones: jobs, the comparison, the ablation, what a GPU has to do, the demo, exports."""
