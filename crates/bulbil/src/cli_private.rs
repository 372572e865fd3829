//! Values that may hold a secret by mistake: what is wrong with one is told, the value itself is not.

use std::ffi::OsStr;

use clap::builder::{StringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, Command, Error};

/// Parses with a function, as clap does, but repeats nothing of the value.
#[derive(Clone)]
pub(crate) struct Private<T>(pub(crate) fn(&str) -> Result<T, String>);

impl<T: Clone + Send + Sync + 'static> TypedValueParser for Private<T> {
    type Value = T;

    fn parse_ref(&self, command: &Command, argument: Option<&Arg>, value: &OsStr) -> Result<T, Error> {
        let text = StringValueParser::new().parse_ref(command, argument, value)?;
        (self.0)(&text).map_err(|reason| {
            let named = argument.map_or_else(|| "an argument".to_owned(), |argument| format!("'{argument}'"));
            Error::raw(ErrorKind::ValueValidation, format!("invalid value for {named}: {reason}\n")).with_cmd(command)
        })
    }
}
