"""What every room shares: errors, the registry, records that travel, roles, probability, sums, files."""
