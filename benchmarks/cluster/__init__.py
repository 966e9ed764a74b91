"""A cluster on one machine: namespaces with bandwidth limits, and what is measured in them."""
