//! Groups in action.
