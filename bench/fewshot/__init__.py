"""What pretraining is worth: accuracy by the number of labelled scans, from ImageNet's weights and from random ones."""
