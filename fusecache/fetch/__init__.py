"""Which block is fetched when and by whom: brings object versions into the store, and wakes the readers that wait."""
