"""What tests are made of, the same in each of them: small matrices, networks and calibrations."""
