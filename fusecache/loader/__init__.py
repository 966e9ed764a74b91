"""Block lookup, single flight, prefetch: brings object versions into the store, and wakes who waits."""
