"""Records a run while it trains, and makes the page of the run from this record."""
