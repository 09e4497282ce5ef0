"""Label-efficiency experiments: what pretraining is worth with few labels, as tables with error bars."""
