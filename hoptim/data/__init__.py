"""What to train on: streams of several sources. See hoptim/data/README.md."""
