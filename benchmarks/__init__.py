"""What is compared, against which baseline, and how it is measured."""
