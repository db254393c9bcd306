"""All that the two training scripts are made of: eight packages, each on top of those below it.

From the top: training, checkpoint, runtime, data, metrics, distributed, launch, config.
"""
